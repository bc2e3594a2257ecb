"""The sides of bench_trainers.py: align's trainers and TRL's, on the same weights and token ids.

KTO trains on the pairs, as two labelled rows each; with natural lengths, on half of them. TRL estimates its KL per
micro-batch and align per step, so TRL's micro-batch is the whole batch here. TRL has no length grouping for KTO.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VOCABULARY, LENGTH, FIXED = 2048, 512, 128
BATCH, MICRO_BATCH, LEARNING_RATE = 16, 8, 1e-4
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
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
}
"""Sizes by `model_type`."""
DENSE = ("llama",)
ALIGN, PADDED, GROUPED = "align", "TRL, padded", "TRL, grouped by length"


# --- shared inputs ------------------------------------------------------------------------------------------------


def spread(rows: list[Any], count: int) -> list[Any]:
    """`count` rows at equal distances."""
    return rows[:: max(1, len(rows) // count)][:count]


def conversations(file: str | None) -> list[tuple[str, str]]:
    """(prompt, answer) of each row."""
    if file is None:
        from align.data.python_docs import python_docs_rows

        rows = python_docs_rows("conversation", "train", 2000)
        return [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows]
    lines = Path(file).read_text(encoding="utf-8").strip("\n").split("\n")
    return [(row["instruction"] + row.get("input", ""), row["output"]) for row in map(json.loads, lines)]


def write_inputs(folder: Path, rows: int, sft: str | None, pairs: str | None) -> None:
    """Write tokenizer, `rows` conversations and as many pairs to `folder`.

    sft, pairs: JSONL files. Without `pairs`, the rejected answer is that of another prompt.
    """
    from align.data.tokenizer import train_tokenizer

    found = conversations(sft)
    train_tokenizer([text for row in found for text in row], VOCABULARY).save_pretrained(folder / "tokenizer")
    found = spread(found, rows)
    others = found[1:] + found[:1]
    made = [
        {"prompt": prompt, "chosen": chosen, "rejected": other}
        for (prompt, chosen), (_, other) in zip(found, others, strict=True)
    ]
    if pairs is not None:
        lines = spread(Path(pairs).read_text(encoding="utf-8").strip("\n").split("\n"), rows)
        made = [{key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")} for line in lines]
    turns = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in found
    ]
    for name, written in (("sft", turns), ("pairs", made)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")


def write_model(folder: Path, model_type: str, *, scorer: bool) -> None:
    """Write a random checkpoint with the tokenizer to `model_folder`."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from align.models.family import family

    torch.manual_seed(0)
    known, path = family(model_type), model_folder(folder, model_type, scorer=scorer)
    config = AutoConfig.for_model(model_type, **SHARED, **MODELS[model_type], **({"num_labels": 1} if scorer else {}))
    (known.scorer if scorer else known.policy)(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(path)


def model_folder(folder: Path, model_type: str, *, scorer: bool) -> Path:
    return folder / f"{model_type}{'-scorer' * scorer}"


def prepared(stage: Any, tokenizer: Any, kind: str, *, fixed: bool) -> Any:
    """The tokenised rows; fixed: truncated or repeated to `FIXED` tokens."""
    from align.data import prepare
    from align.data.encode import is_ids

    if kind == "sft":
        data = prepare.prepare_sft(stage.data, tokenizer, assistant_only_loss=True, seed=0)
    else:
        data = prepare.prepare_stage(stage, tokenizer, seed=0)
    rows = data.train.select_columns([name for name in data.train.column_names if is_ids(name)])
    if kind == "kto" and not fixed:
        rows = rows.select(range(len(rows) // 2))
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


def sequence_lengths(rows: Any, kind: str) -> list[int]:
    """Tokens of each sequence of an epoch: of both sequences of a pair, with the prompt; without KTO's mismatched
    completions."""
    prompts = list(map(len, rows["prompt_ids"])) if kind in ("dpo", "kto") else [0] * len(rows)
    columns = {"sft": ["input_ids"], "kto": ["completion_ids"]}.get(kind, ["chosen_ids", "rejected_ids"])
    return [prompt + len(ids) for name in columns for prompt, ids in zip(prompts, rows[name], strict=True)]


# --- the sides ----------------------------------------------------------------------------------------------------


class Case:
    """One model, kind of trainer and set of rows, with the trainer of each side.

    trainer: the side's trainer, after `epoch` was called, and for align after its first epoch.
    """

    trainer: Any = None

    def __init__(
        self,
        folder: Path,
        model_type: str,
        kind: str,
        *,
        fixed: bool,
        seed: int = 0,
        learning_rate: float = LEARNING_RATE,
    ):
        """seed: of the order of the rows."""
        from align.config.recipe import Recipe
        from align.run.context import StageContext
        from align.train.checkpoint import load_tokenizer

        self.folder, self.model_type, self.kind = folder, model_type, kind
        self.path = model_folder(folder, model_type, scorer=kind == "reward_model")
        base = model_folder(folder, model_type, scorer=False)
        source = folder / ("sft.jsonl" if kind == "sft" else "pairs.jsonl")
        values = {
            "kind": kind,
            "init_from": str(base),
            "data": {"train": [{"path": str(source)}], "max_length": LENGTH},
            "optimizer": {"learning_rate": learning_rate, "schedule": "constant", "warmup_fraction": 0.0},
            "batch_size": BATCH,
            "micro_batch_tokens": MICRO_BATCH * (FIXED if fixed else LENGTH),
            "checkpoint_every": 10**6,
            **({"center_coef": 0.0} if kind == "reward_model" else {}),
        }
        model = {"kind": "pretrained", "path": str(base)}
        self.recipe = Recipe.model_validate({"name": "b", "model": model, "seed": seed, "stages": {"stage": values}})
        self.stage: Any = self.recipe.stages["stage"]
        self.context = StageContext(self.recipe, "stage", folder / "run", say=lambda line: None)
        self.tokenizer = load_tokenizer(base)
        self.data = prepared(self.stage, self.tokenizer, kind, fixed=fixed)

    def epoch(self, side: str, implementation: str | None) -> Callable[[], list[float]]:
        """A function that trains one epoch of the side and returns the losses."""
        return self.align() if side == ALIGN else self.trl(implementation, grouped=side == GROUPED)

    def align(self) -> Callable[[], list[float]]:
        from dataclasses import replace

        from align.models.family import family
        from align.train.kto import Kto, KtoTrainer, kto_objectives
        from align.train.objectives import BradleyTerry, CrossEntropy, Preference
        from align.train.references import reference_logprobs
        from align.train.trainer import PackedTrainer

        known = family(self.model_type)
        objective: Any = {
            "sft": lambda stage: CrossEntropy(),
            "reward_model": lambda stage: BradleyTerry(stage.center_coef),
            "dpo": Preference,
            "kto": Kto,
        }[self.kind](self.stage)
        trainers: list[PackedTrainer] = []

        def with_references() -> Any:
            with tempfile.TemporaryDirectory() as cache:  # without the log-probabilities of the epoch before
                os.environ["ALIGN_CACHE"] = cache
                if self.kind == "dpo":
                    found = reference_logprobs(self.path, self.stage, self.context, self.data, objective)
                    return replace(objective, references=found.train)
                return kto_objectives(self.path, self.stage, self.context, self.data)[0]

        def epoch() -> list[float]:
            # A stage computes the log-probabilities of the reference before it loads the policy.
            known_objective = with_references() if self.kind in ("dpo", "kto") else objective
            if not trainers:
                model = (known.scorer if self.kind == "reward_model" else known.policy).from_pretrained(self.path)
                shared = {"model": model, "data": self.data, "processing_class": self.tokenizer}
                trainer = KtoTrainer if self.kind == "kto" else PackedTrainer
                trainers.append(trainer(stage=self.stage, context=self.context, objective=known_objective, **shared))
                self.trainer = trainers[0]
                trainers[0].args.save_strategy = "no"  # as TRL's; otherwise the last step ends with a checkpoint
            trainers[0].objective = known_objective
            return losses_of(trainers[0])

        return epoch

    def trl(self, implementation: str | None, *, grouped: bool = False) -> Callable[[], list[float]]:
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
            "learning_rate": self.stage.optimizer.learning_rate,
            "lr_scheduler_type": "constant",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "max_grad_norm": self.stage.optimizer.max_grad_norm,
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
        self.trainer = trainer
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
