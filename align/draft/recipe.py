"""Write a commented recipe for a model, data files, stages and a machine, if `align check` accepts it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.load import dump, load_recipe
from align.config.recipe import BASE, Recipe, nearest_batch
from align.config.stage import LANGUAGE_MODEL
from align.draft.data import KINDS, DataLook
from align.draft.machine import FROZEN_BYTES, FULL_BYTES, Machine, ModelLook
from align.errors import UserError
from align.preflight import problems
from align.run.folder import disk_error

CHATML = ("<|im_start|>", "<|im_end|>")
LEARNING_RATES = {
    "pretrain": (1e-4, 2e-4),
    "sft": (1e-5, 2e-4),
    "reward_model": (1e-5, 1e-4),
    "dpo": (1e-6, 1e-5),
    "kto": (1e-6, 1e-5),
}
"""{stage: (learning rate of full training, of LoRA)}: common starting points."""
BATCH = {"pretrain": 32, "sft": 16, "reward_model": 32, "dpo": 32, "kto": 32}
PASS_TOKENS = {True: 16_384, False: 4096}
"""{True with a GPU: tokens per forward pass}: starting points."""
ROOM = 0.6
"""Share of the memory for weights, gradients and optimizer state; the rest is for activations."""
SMALL, LARGE = 40, 400
"""Numbers of rows: below SMALL none are held out, below LARGE a tenth, otherwise a twentieth."""
INDENT = "  "


@dataclass(frozen=True)
class Draft:
    """Choices from which a recipe is written.

    name: name of the run.
    model: checkpoint folder, hub id, or the name of the embedded model.
    look: facts about the model's files.
    data: {stage: its data}, in the order of the stages.
    machine: the machine that will train.
    lora: train adapters instead of all weights.
    max_length: maximum tokens per row; None derives it from the data.
    """

    name: str
    model: str
    look: ModelLook
    data: dict[str, DataLook]
    machine: Machine
    lora: bool
    max_length: int | None = None

    @property
    def processes(self) -> int:
        return max(1, self.machine.gpus)

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.machine.gpus and self.machine.bfloat16 else "float32"

    @property
    def adds_template(self) -> bool:
        """True if the rows need a chat template and the tokenizer has none."""
        plain = ("text", "token_ids")
        return self.look.template is False and any(data.shape not in plain for data in self.data.values())

    def length(self, stage: str) -> int:
        longest = self.max_length or self.data[stage].length
        return min(longest, self.look.context or longest)


def stages_for(data: Sequence[DataLook], wanted: Sequence[str]) -> dict[str, DataLook]:
    """{stage: its data} in running order. A stage takes the first file whose rows it accepts.

    Raises `UserError` for a stage without data, and for a file that no stage uses.
    """
    found = {}
    for stage in (name for name in KINDS if name in wanted):
        fitting = [look for look in data if look.fits(stage)]
        if not fitting:
            has = "; ".join(f"{look.path} has {look.shape} rows, for {' or '.join(look.stages)}" for look in data)
            raise UserError(f"--stage {stage}: no data for it ({has}). Add a file with --data, or change --stage.")
        found[stage] = fitting[0]
    for look in data:
        if not any(look is used for used in found.values()):
            other = " or ".join(look.stages)
            raise UserError(
                f"--data {look.path}: no stage uses its {look.shape} rows. Add --stage {other}, or drop it."
            )
    return found


def trains_fully(look: ModelLook, machine: Machine) -> bool:
    """True if training all weights fits in memory; False if it does not, or if the model's size is unknown."""
    if look.parameters is None:
        return False
    return look.parameters * FULL_BYTES <= ROOM * machine.memory_gb * 1e9 * max(1, machine.gpus)


def too_small(draft: Draft) -> str | None:
    """Warning if weights, gradients and optimizer state leave too little memory for activations; otherwise None."""
    if draft.look.parameters is None:
        return None
    per = FROZEN_BYTES[draft.dtype] if draft.lora else FULL_BYTES
    needed = draft.look.parameters * per / 1e9
    have = draft.machine.memory_gb * draft.processes
    if needed <= ROOM * have:
        return None
    return (
        f"the weights {'' if draft.lora else 'and optimizer '}need {needed:.0f} GB of {have:.0f} GB: see `align plan`"
    )


def text_of(draft: Draft) -> str:
    """The recipe as YAML with comments."""
    lines = [
        f"# Written by `align init` for {draft.machine.summary()}.",
        "# `align show` prints it with every setting; docs/recipes.md explains them. A setting can also be changed for",
        "# one run, after the command: stages.STAGE.optimizer.learning_rate=1e-5",
        f"name: {_yaml(draft.name)}  # the run's folder is runs/{draft.name}",
        "seed: 0",
        f"dtype: {draft.dtype}" + ("" if draft.dtype == "bfloat16" else "  # bfloat16 is for GPUs"),
    ]
    if draft.processes > 1:
        lines += [
            "parallel:",
            f"{INDENT}processes: {draft.processes}  # one per GPU",
            f"{INDENT}zero_stage: 3  # shards weights, gradients and optimizer; 2 is faster if the weights fit",
        ]
    lines += ["model:", f"{INDENT}kind: pretrained", f"{INDENT}path: {_yaml(draft.model)}"]
    if draft.adds_template:
        lines += [
            f"{INDENT}# The tokenizer has no chat template; with these tokens it gets ChatML's. They are trained.",
            f"{INDENT}add_tokens: {_yaml(list(CHATML))}",
        ]
    lines.append("stages:")
    parent = BASE
    for stage in draft.data:
        lines += [f"{INDENT}{line}".rstrip() for line in _stage(draft, stage, parent)]
        parent = parent if stage == "reward_model" else stage
    return "\n".join(lines) + "\n"


def _stage(draft: Draft, stage: str, parent: str) -> list[str]:
    data, length = draft.data[stage], draft.length(stage)
    small = data.whole and data.rows < LARGE
    batch = nearest_batch(min(BATCH[stage], max(2, data.rows // 8)) if small else BATCH[stage], draft.processes)
    sequences = 2 if KINDS[stage] in ("reward_pairs", "dpo_pairs") else 1
    rows = max(1, min(batch // draft.processes, PASS_TOKENS[draft.machine.gpus > 0] // (sequences * length)))
    fully, adapted = LEARNING_RATES[stage]
    unit = "pairs" if sequences == 2 else "rows"
    lines = [
        f"{stage}:",
        f"  kind: {stage}",
        f"  init_from: {parent}" + ("  # the model above" if parent == BASE else ""),
        "  data:",
        f"    train: [{{path: {_yaml(data.path)}{_columns(data)}}}]  # {data.summary()}",
        *_held_out(data),
        f"    max_length: {length}  # tokens per row; longer rows are "
        + ("dropped" if sequences == 2 else "split" if stage == "pretrain" else "truncated"),
    ]
    rate = f"{adapted if draft.lora else fully:.0e}".replace("e-0", "e-")
    lines.append(f"  optimizer: {{learning_rate: {rate}}}  # AdamW, 5 % warm-up, cosine decay to 0")
    if draft.lora:
        more = ", train_embeddings: true" if draft.adds_template else ""
        lines.append(f"  lora: {{rank: 16, alpha: 32{more}}}  # remove the line to train all weights")
    if stage in ("dpo", "kto"):
        lines.append("  beta: 0.1  # larger values keep the model nearer to its parent")
    lines += [
        f"  epochs: {3 if small else 1}" + ("  # the file is small" if small else ""),
        f"  batch_size: {batch}  # {unit} per optimizer step, over all processes",
        f"  micro_batch_size: {rows}  # {unit} per forward pass and process; lower it first if memory runs out",
    ]
    if draft.machine.gpus:
        lines.append("  gradient_checkpointing: true  # less memory, about a third more time")
    return lines


def _columns(data: DataLook) -> str:
    if not data.columns:
        return ""
    return f", columns: {{{', '.join(f'{new}: {_yaml(old)}' for new, old in data.columns.items())}}}"


def _held_out(data: DataLook) -> list[str]:
    if data.whole and data.rows < SMALL:
        return ["    # Too few rows to hold some out; more data would need held_out_fraction: 0.05"]
    fraction = 0.1 if data.whole and data.rows < LARGE else 0.05
    return [f"    held_out_fraction: {fraction:g}  # evaluated, not trained on; the same prompts stay held out"]


def _yaml(value: object) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    text = dump([value])[2:].strip()
    return (
        text if "," not in text and "{" not in text and "[" not in text else "'" + str(value).replace("'", "''") + "'"
    )


def run_name(text: str) -> str:
    """A valid run name made from any text."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "run"


def write_recipe(out: Path, text: str, checked: Callable[[Recipe], list[str]] | None = None) -> Recipe:
    """Write a recipe that `align check` accepts; otherwise write nothing and raise `UserError` with its problems.

    checked: returns the recipe's problems; default: the checks of `align check`.
    An existing file is not overwritten: `UserError` is raised.
    """
    refuse_existing(out)
    partial = out.with_name(f".{out.stem}.partial-{os.getpid()}.yaml")
    try:
        partial.write_text(text, encoding="utf-8")
        try:
            recipe = load_recipe(partial)
        except UserError as error:
            raise UserError(str(error).replace(str(partial), str(out))) from None
        found = checked(recipe) if checked else problems(recipe, [BASE, *recipe.stages])
        if found:
            raise UserError("\n".join(f"{out}: {problem}" for problem in found))
        os.link(partial, out)  # fails if it exists, unlike a rename
    except FileExistsError:
        raise _exists(out) from None
    except OSError as error:
        raise disk_error(out, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return recipe


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise _exists(out)
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out}: the name does not end in .yaml. Pass another name.")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: the folder does not exist. Create it.")


def _exists(out: Path) -> UserError:
    return UserError(f"{out}: exists already. Pass another name, or remove the file.")


def next_commands(out: Path, recipe: Recipe) -> list[tuple[str, str]]:
    """The next three commands: (command, its purpose)."""
    file, run = shlex.quote(str(out)), f"runs/{recipe.name}"
    first, *_ = recipe.stages
    last = next((name for name in reversed(recipe.stages) if recipe.stages[name].makes == LANGUAGE_MODEL), None)
    third = (f"align chat {run}/{last}", "talk to the result")
    if last is None:
        name, stage = next(iter(recipe.stages.items()))
        pairs = getattr(stage, "data").train[0].path  # noqa: B009  a training stage has data
        third = (f"align eval {run}/{name} --pairs {shlex.quote(pairs)}", "accuracy, length bias and calibration")
    return [
        (f"align data show {file} {first}", "the rows as the model sees them, and the time that the stage takes"),
        (f"align run {file}", "train"),
        third,
    ]
