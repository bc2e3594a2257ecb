"""SFT, reward model, DPO and KTO against TRL's trainers: tokens per second, peak memory and loss curves.

Both sides train the same weights on the same tokenised rows, in the same order, with AdamW in float32. TRL trains
transformers' own model class with its fastest `experts_implementation`, which is determined first; rows padded, and
padded with length grouping. The sides alternate in one process, epoch by epoch. An epoch of DPO and KTO includes the
log-probabilities of the reference. Peak memory is measured in a process of its own per side.

KTO trains on the pairs, as two labelled rows each. TRL estimates its KL per micro-batch and align per step, so TRL's
micro-batch is the whole batch here. TRL has no length grouping for KTO.

Rows are conversations of the installed Python's documentation, or of --sft FILE and --pairs FILE. "fixed lengths" has
rows of one length, without padding on either side.

python benchmarks/bench_trainers.py [--models a,b] [--kinds sft,dpo] [--rows N] [--repeats N] [--sft FILE --pairs FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import PeakMemory, in_new_process, write

VOCABULARY, LENGTH, FIXED = 2048, 512, 256
BATCH, MICRO_BATCH, LEARNING_RATE = 16, 8, 1e-4
IMPLEMENTATIONS = ("grouped_mm", "eager")
"""Not batched_mm, which copies an expert's weights for each of its tokens: a step takes more than 40 times as long."""
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 256, "head_dim": 64, "intermediate_size": 512, **EXPERTS},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 256, "sliding_window": None, **EXPERTS},
    "llama": {"intermediate_size": 768},
    "hunyuan": {
        "num_experts": 8,
        "moe_topk": 1,
        "num_shared_expert": 1,
        "intermediate_size": 256,
        "router_aux_loss_coef": 0.0,
    },
}
"""Sizes by `model_type`; TRL has no counterpart of `hunyuan`."""
TARGETS = {"variable lengths": 2.0, "fixed lengths": 1.0}


# --- shared inputs ------------------------------------------------------------------------------------------------


def conversations(file: str | None, rows: int) -> list[tuple[str, str]]:
    """(prompt, answer) of each row."""
    if file is None:
        from align.data.python_docs import python_docs_rows

        rows_read = python_docs_rows("conversation", "train", 2000)
        found = [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows_read]
        return found[:: max(1, len(found) // rows)][:rows]
    lines = Path(file).read_text(encoding="utf-8").strip("\n").split("\n")[:rows]
    return [(row["instruction"] + row.get("input", ""), row["output"]) for row in map(json.loads, lines)]


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Write tokenizer, conversations and pairs to `folder`. A pair's rejected answer is that of another prompt."""
    from align.data.tokenizer import train_tokenizer

    found = conversations(options.sft, options.rows)
    others = found[1:] + found[:1]
    pairs = [
        {"prompt": prompt, "chosen": chosen, "rejected": other}
        for (prompt, chosen), (_, other) in zip(found, others, strict=True)
    ]
    if options.pairs is not None:
        lines = Path(options.pairs).read_text(encoding="utf-8").strip("\n").split("\n")[: options.rows]
        pairs = [{key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")} for line in lines]
    turns = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in found
    ]
    for name, rows in (("sft", turns), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train_tokenizer([text for row in found for text in row], VOCABULARY).save_pretrained(folder / "tokenizer")


def model_folder(model_type: str, folder: Path, *, scorer: bool) -> Path:
    """A random checkpoint with the tokenizer, written once."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from align.models.family import family

    path = folder / f"{model_type}{'-scorer' * scorer}"
    if not path.exists():
        torch.manual_seed(0)
        known = family(model_type)
        config = AutoConfig.for_model(
            model_type, **SHARED, **MODELS[model_type], **({"num_labels": 1} if scorer else {})
        )
        (known.scorer if scorer else known.policy)(config).save_pretrained(path)
        AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(path)
    return path


def prepared(stage: Any, tokenizer: Any, kind: str, *, fixed: bool) -> Any:
    """The tokenised rows; fixed: cut or repeated to `FIXED` tokens."""
    from align.data import prepare
    from align.data.encode import is_ids

    if kind == "sft":
        data = prepare.prepare_sft(stage.data, tokenizer, assistant_only_loss=True, seed=0)
    else:
        data = prepare.prepare_stage(stage, tokenizer, seed=0)
    columns = [name for name in data.train.column_names if is_ids(name)]
    rows = data.train.select_columns(columns)
    if fixed:
        rows = rows.map(lambda row: to_fixed(row, kind))
    return SimpleNamespace(train=rows, held_out=None, report=data.report)


def to_fixed(row: dict[str, list[int]], kind: str) -> dict[str, list[int]]:
    def stretch(values: list[int], length: int) -> list[int]:
        return (values * (length // len(values) + 1))[:length]

    if kind in ("dpo", "kto"):
        prompt = stretch(row["prompt_ids"], FIXED // 4)
        sides = {name: stretch(row[name], FIXED - len(prompt)) for name in row if name not in ("prompt_ids", "label")}
        return {**row, "prompt_ids": prompt, **sides}
    return {name: stretch(values, FIXED) for name, values in row.items()}


def tokens_of(rows: Any, kind: str) -> int:
    """Tokens of an epoch: of both sequences of a pair, with the prompt; without mismatched completions."""
    if kind == "sft":
        return sum(map(len, rows["input_ids"]))
    if kind == "kto":
        return sum(map(len, rows["prompt_ids"])) + sum(map(len, rows["completion_ids"]))
    prompts = 2 * sum(map(len, rows["prompt_ids"])) if kind == "dpo" else 0
    return prompts + sum(map(len, rows["chosen_ids"])) + sum(map(len, rows["rejected_ids"]))


# --- the two sides ------------------------------------------------------------------------------------------------


class Case:
    """One model, kind of trainer and set of rows."""

    def __init__(self, folder: Path, model_type: str, kind: str, *, fixed: bool):
        from align.config.recipe import Recipe
        from align.run.context import StageContext
        from align.train.checkpoint import load_tokenizer

        self.folder, self.model_type, self.kind = folder, model_type, kind
        self.path = model_folder(model_type, folder, scorer=kind == "reward_model")
        base = model_folder(model_type, folder, scorer=False)
        source = folder / ("sft.jsonl" if kind == "sft" else "pairs.jsonl")
        values = {
            "kind": kind,
            "init_from": str(base),
            "data": {"train": [{"path": str(source)}], "max_length": LENGTH},
            "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_fraction": 0.0},
            "batch_size": BATCH,
            "micro_batch_size": MICRO_BATCH,
            "checkpoint_every": 10**6,
            **({"center_coef": 0.0} if kind == "reward_model" else {}),
        }
        recipe = {"name": "b", "model": {"kind": "pretrained", "path": str(base)}, "stages": {"stage": values}}
        self.recipe = Recipe.model_validate(recipe)
        self.stage: Any = self.recipe.stages["stage"]
        self.context = StageContext(self.recipe, "stage", folder / "run", say=lambda line: None)
        self.tokenizer = load_tokenizer(base)
        self.data = prepared(self.stage, self.tokenizer, kind, fixed=fixed)
        self.tokens = tokens_of(self.data.train, kind)

    def align(self) -> Callable[[], list[float]]:
        """A function that trains one epoch and returns the losses."""
        from dataclasses import replace

        from align.models.family import family
        from align.train.kto import Kto, KtoTrainer, kto_objectives
        from align.train.objectives import BradleyTerry, CrossEntropy, Preference
        from align.train.references import reference_logprobs
        from align.train.trainer import PackedTrainer

        known = family(self.model_type)
        model = (known.scorer if self.kind == "reward_model" else known.policy).from_pretrained(self.path)
        objective: Any = {
            "sft": CrossEntropy(),
            "reward_model": BradleyTerry(0.0),
            "dpo": Preference(self.stage),
            "kto": Kto(self.stage),
        }[self.kind]
        trainer = (KtoTrainer if self.kind == "kto" else PackedTrainer)(
            stage=self.stage,
            context=self.context,
            objective=objective,
            model=model,
            data=self.data,
            processing_class=self.tokenizer,
        )

        def epoch() -> list[float]:
            with tempfile.TemporaryDirectory() as cache:  # without the log-probabilities of the epoch before
                os.environ["ALIGN_CACHE"] = cache
                if self.kind == "dpo":
                    found = reference_logprobs(self.path, self.stage, self.context, self.data, objective)
                    trainer.objective = replace(objective, references=found.train)
                elif self.kind == "kto":
                    trainer.objective, _ = kto_objectives(self.path, self.stage, self.context, self.data)
            return losses_of(trainer)

        return epoch

    def trl(self, implementation: str | None, *, grouped: bool = False) -> Callable[[], list[float]]:
        """The same with TRL's trainer."""
        import trl
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        def load(auto: Any) -> Any:
            model = auto.from_pretrained(self.path, dtype="float32")
            if implementation is not None:
                model.set_experts_implementation(implementation)
            return model

        arguments: dict[str, Any] = {
            "output_dir": str(self.folder / "trl"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": BATCH // MICRO_BATCH,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "max_grad_norm": 1.0,
            "adam_beta2": self.stage.optimizer.betas[1],
            "adam_epsilon": self.stage.optimizer.eps,
            "weight_decay": self.stage.optimizer.weight_decay,
            "seed": self.context.seed,
            "data_seed": self.context.seed,
            "dataloader_pin_memory": False,
            "max_length": None,
            "train_sampling_strategy": "group_by_length" if grouped else "random",
        }
        rows = self.data.train
        if grouped:  # transformers reads the lengths from this column
            lengths = [sum(len(ids) for name, ids in row.items() if name.endswith("ids")) for row in rows]
            rows = rows.add_column("length", lengths)
        shared = {"train_dataset": rows, "processing_class": self.tokenizer}
        if self.kind == "sft":
            config: Any = trl.SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
            trainer: Any = trl.SFTTrainer(load(AutoModelForCausalLM), args=config, **shared)
        elif self.kind == "reward_model":
            model = load(AutoModelForSequenceClassification)
            trainer = trl.RewardTrainer(model, args=trl.RewardConfig(**arguments), **shared)
        elif self.kind == "kto":
            whole = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
            config = trl.KTOConfig(**{**arguments, **whole, "train_sampling_strategy": "sequential"})
            config.beta, shared["train_dataset"] = self.stage.beta, self.mismatched_rows()
            model, reference = load(AutoModelForCausalLM), load(AutoModelForCausalLM)
            trainer = tokenised(trl.KTOTrainer)(model, ref_model=reference, args=config, **shared)
        else:
            model, reference = load(AutoModelForCausalLM), load(AutoModelForCausalLM)
            config = trl.DPOConfig(**arguments, beta=self.stage.beta)
            trainer = tokenised(trl.DPOTrainer)(model, ref_model=reference, args=config, **shared)
        if grouped:  # the trainers of pairs drop the column
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns.append("length")
        return lambda: losses_of(trainer)

    def mismatched_rows(self) -> Any:
        """The rows in the order in which align trains on them, with the mismatched completions that it takes."""
        from align.data.store.tokenised import list_hashes
        from align.train.kto import donors
        from align.train.steps import steps_of_run

        prompts, pairs = list_hashes(self.data.train, "prompt_ids"), list[tuple[int, int]]()
        for step in steps_of_run(self.stage, self.data.train, self.context.seed):
            pairs += zip(step, [step[donor] for donor in donors(prompts[step])], strict=True)
        rows = self.data.train.select([row for row, _ in pairs])
        completions = self.data.train["completion_ids"]
        labels = [label == [1] for label in rows["label"]]
        rows = rows.remove_columns(["completion_labels", "label"]).add_column("label", labels)
        return rows.add_column("KL_completion_ids", [completions[donor] for _, donor in pairs])


def tokenised(trainer: type) -> Any:
    """TRL's trainer without its tokenisation, because the rows are token ids."""
    return type(trainer.__name__, (trainer,), {"_prepare_dataset": lambda self, dataset, *_, **__: dataset})


def losses_of(trainer: Any) -> list[float]:
    """Train one epoch; returns the loss of each step."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def quiet() -> None:
    import datasets
    import transformers

    from align.train.quiet import quieten

    quieten()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()


# --- measurement --------------------------------------------------------------------------------------------------


def fastest(case: Case) -> tuple[str | None, dict[str, float]]:
    """TRL's fastest experts implementation, and the seconds of one step of each, after one as a warm-up."""
    if case.model_type == "llama":
        return None, {}
    whole, seconds = case.data, dict[str, float]()
    case.data = SimpleNamespace(train=whole.train.select(range(BATCH)), held_out=None, report=whole.report)
    for implementation in IMPLEMENTATIONS:
        epoch = case.trl(implementation)
        epoch()
        start = time.perf_counter()
        epoch()
        seconds[implementation] = round(time.perf_counter() - start, 3)
    case.data = whole
    return min(seconds, key=seconds.__getitem__), seconds


def measure(case: Case, implementation: str | None, repeats: int) -> dict[str, Any]:
    """Alternate epochs of the sides. The first epoch of each side is a warm-up; its losses are compared."""
    sides = {"align": case.align()}
    if case.model_type != "hunyuan":
        sides["TRL, padded"] = case.trl(implementation)
        if case.kind != "kto":
            sides["TRL, grouped by length"] = case.trl(implementation, grouped=True)
    losses = {name: epoch() for name, epoch in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {
        "tokens": case.tokens,
        "steps": len(losses["align"]),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "tokens_per_second": {name: round(case.tokens / statistics.median(values)) for name, values in seconds.items()},
        "losses": {name: [round(loss, 6) for loss in values] for name, values in losses.items()},
    }
    if len(sides) > 1:
        ratios = {
            name: statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["align"], strict=True))
            for name in list(sides)[1:]
        }
        found["align / TRL"] = {name: round(ratio, 3) for name, ratio in ratios.items()}
        found["largest loss difference"] = max(
            abs(ours - theirs) for ours, theirs in zip(losses["align"], losses["TRL, padded"], strict=True)
        )
    return found


def peak_mib(folder: Path, model_type: str, kind: str, side: str, implementation: str, *, fixed: bool) -> float:
    """Peak memory of an epoch beyond that of the loaded trainer; runs in a process of its own."""
    case = Case(folder, model_type, kind, fixed=fixed)
    epoch = case.align() if side == "align" else case.trl(implementation or None, grouped="grouped" in side)
    with PeakMemory() as peak:
        epoch()
    return round(peak.bytes / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--kinds", default="sft,reward_model,dpo,kto")
    parser.add_argument("--lengths", default=",".join(TARGETS))
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sft", help="JSONL file of conversations: instruction, input, output")
    parser.add_argument("--pairs", help="JSONL file of pairs: prompt, chosen, rejected")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.peak:
        arguments = json.loads(options.peak)
        print(json.dumps({"peak": peak_mib(Path(arguments.pop("folder")), **arguments)}))
        return
    results: dict[str, Any] = {"settings": {"batch": BATCH, "micro_batch": MICRO_BATCH, **SHARED}, "models": MODELS}
    results["rows"] = {"sft": Path(options.sft or "python_docs").name, "pairs": Path(options.pairs or "made").name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options)
        for model_type in options.models.split(","):
            chosen: str | None = None
            tried: dict[str, float] = {}
            for lengths in options.lengths.split(","):
                for kind in options.kinds.split(","):
                    fixed = lengths == "fixed lengths"
                    case = Case(folder, model_type, kind, fixed=fixed)
                    if model_type != "hunyuan" and chosen is None:
                        chosen, tried = fastest(case)
                        results[f"{model_type}: TRL by experts_implementation, seconds"] = tried
                    found = measure(case, chosen, options.repeats)
                    if not options.no_memory:
                        shared = {"folder": name, "model_type": model_type, "kind": kind, "fixed": fixed}
                        found["peak_mib"] = {
                            side: in_new_process(
                                "--peak", json.dumps({**shared, "side": side, "implementation": chosen or ""})
                            )["peak"]
                            for side in found["seconds"]
                        }
                    results[f"{model_type}, {kind}, {lengths}"] = found
                    short = found.get("align / TRL", found["tokens_per_second"])
                    print(f"{model_type}, {kind}, {lengths}: {short}", file=sys.stderr, flush=True)
                    write("trainers", results, option=" ".join(sys.argv[1:]), show=False)


if __name__ == "__main__":
    main()
