"""The whole recipe."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.parallel import Parallel
from align.config.parts import Model, Section
from align.config.presets import unknown_keys
from align.config.stage import LANGUAGE_MODEL
from align.config.stages import Stage, TrainingStage

BASE = "base"
"""The name under which stages refer to the recipe's model."""

STAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Recipe(Section):
    """What a run does: a model, and stages that run in the order in which they are written."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `runs/<name>` unless --run-dir says otherwise."""
    description: str = ""
    """Free text about the run."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of every random choice: initial weights, shuffles, dropout and sampling; each stage derives its own from it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and arithmetic. On a CPU without AVX-512 bf16 is several times slower than float32."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads; by default torch's own choice."""
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=list)
    """Experiment trackers that are sent every stage's metrics, beside metrics.jsonl; they must be installed."""
    parallel: Parallel | None = None
    """Several processes: ZeRO, expert parallelism, offload; by default one process without DeepSpeed."""
    model: Model
    """The model that stages call `base`."""
    stages: dict[str, Stage] = Field(min_length=1)
    """What is done, under names of your own (lower-case letters, digits and `_`); stages run in the order written."""

    @model_validator(mode="after")
    def _model_has_known_keys(self) -> Recipe:
        if problems := unknown_keys(self.model.config):
            raise ValueError(".\n".join(problems))
        return self

    @model_validator(mode="after")
    def _stages_refer_backwards(self) -> Recipe:
        seen: list[str] = []
        for name, stage in self.stages.items():
            if not STAGE_NAME.fullmatch(name) or name == BASE:
                raise ValueError(
                    f"stage name '{name}' cannot be used: write lower-case letters, digits and '_', and not '{BASE}'"
                )
            for where, parent, accepted in stage.references():
                if parent in seen or parent == BASE:
                    made = LANGUAGE_MODEL if parent == BASE else self.stages[parent].makes
                    if made not in accepted:
                        raise ValueError(
                            f"stages.{name}.{where} names '{parent}', which makes {made}, where "
                            f"{' or '.join(accepted)} is needed; name another stage"
                        )
                    continue
                if is_path(parent):
                    continue
                known = ", ".join([BASE, *seen])
                raise ValueError(
                    f"stages.{name}.{where} names '{parent}', which is not an earlier stage of this recipe; "
                    f"earlier ones are: {known} (a folder is written with a '/')"
                )
            seen.append(name)
        return self

    @model_validator(mode="after")
    def _stages_fit_the_processes(self) -> Recipe:
        processes, source = 1, "parallel.processes, --nproc"
        if self.parallel is not None:
            processes = self.parallel.processes
            source = f"the slots of {self.parallel.hostfile}" if self.parallel.hostfile is not None else source
        problems = []
        for name, stage in self.stages.items():
            if isinstance(stage, TrainingStage) and (problem := _uneven(stage, processes, source)):
                problems.append(f"stages.{name}: {problem}")
        if problems:
            raise ValueError(".\n".join(problems))
        return self


def _uneven(stage: TrainingStage, processes: int, source: str) -> str | None:
    """What is wrong where `processes` cannot share a step's rows, with the nearest values that work.

    source: what says how many processes there are.
    """
    batch, micro = stage.batch_size, stage.micro_batch_size
    share, rest = divmod(batch, processes)
    if rest:
        return (
            f"{processes} processes ({source}) cannot share batch_size {batch} evenly; set "
            f"batch_size to {nearest_batch(batch, micro, processes)}, or use a number of processes that divides it"
        )
    if stage.needs_whole_batch and stage.rows_per_pass(processes) < batch:
        return (
            f"{stage.needs_whole_batch}, so batch_size {batch} must be one forward pass; "
            f"set micro_batch_size to {batch}" + (" and use one process" if processes > 1 else "")
        )
    if share % stage.rows_per_pass(processes) == 0:
        return None
    divided = f"batch_size {batch}" if processes == 1 else f"the {share} rows that each of {processes} processes has"
    return (
        f"micro_batch_size {micro} does not divide {divided}; set micro_batch_size to "
        f"{next(size for size in range(micro, 0, -1) if share % size == 0)} or batch_size to "
        f"{nearest_batch(batch, micro, processes)}"
    )


def nearest_batch(batch: int, micro: int, processes: int) -> int:
    """The smallest batch size, not below `batch`, of which all processes have equally many full passes."""
    share = -(-batch // processes)
    rows = min(micro, share)
    return processes * rows * -(-share // rows)


def is_path(reference: str) -> bool:
    """True where a reference to a checkpoint is a folder or hub id and not the name of a stage."""
    return "/" in reference
