"""One optimizer step of a training stage on a tiny model: its trainer, the step's gradient, and its logged values."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from align.config.recipe import Recipe
from align.data.tokenizer import train_tokenizer
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.recipes import dpo, kto, pretrain, reward_model, sft
from align.run.context import StageContext, StageResult

KINDS: dict[str, Any] = {"pretrain": pretrain, "sft": sft, "reward_model": reward_model, "dpo": dpo, "kto": kto}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_shared_expert": 1,
    "moe_topk": 2,
    "initializer_range": 0.2,
}
WORDS = tuple("abcdefghijklmnopq")
LENGTHS = (2, 11, 5, 8, 3)
"""Words per row."""


def checkpoint(folder: Path) -> Path:
    """Save a random model without router losses, and its tokenizer, to `folder`; return the folder."""
    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    torch.manual_seed(0)
    config = HunYuanConfig(vocab_size=len(tokenizer), router_aux_loss_coef=0.0, **SIZES)
    HunYuanForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text(start: int, words: int) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(words))


def rows(kind: str) -> list[dict[str, Any]]:
    if kind == "pretrain":
        # Packed into four rows of 8 tokens and a shorter one.
        return [{"text": text(3 * n, words)} for n, words in enumerate((9, 3, 14, 5))]
    if kind == "sft":
        turns = [(text(n, 2), text(n + 3, length)) for n, length in enumerate(LENGTHS)]
        pairs = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in turns]
        return [{"messages": list(pair)} for pair in pairs]
    if kind == "kto":
        return [
            {"prompt": text(n, 2 + n % 3), "completion": text(n + 3, length), "label": n % 2 == 0}
            for n, length in enumerate(LENGTHS)
        ]
    return [
        {"prompt": text(n, 2), "chosen": text(n + 3, length), "rejected": text(n + 7, 13 - length)}
        for n, length in enumerate(LENGTHS)
    ]


def prepare(kind: str, model: Path, folder: Path, **stage: Any) -> tuple[Any, Recipe]:
    """The stage's recipe module and a recipe with one stage called `stage`, on rows written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)), encoding="utf-8")
    values = {
        "kind": kind,
        "init_from": str(model),
        "data": {"train": [{"path": str(data)}], "max_length": 8 if kind == "pretrain" else 128},
        "optimizer": {"max_grad_norm": 1e9},
        "batch_size": 6,
        "max_steps": 1,
        **stage,
    }
    recipe = {"name": "t", "model": {"kind": "pretrained", "path": str(model)}, "stages": {"stage": values}}
    return KINDS[kind], Recipe.model_validate(recipe)


def run_stage(
    kind: str,
    model: Path,
    folder: Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str], None] = lambda line: None,
    **stage: Any,
) -> StageResult:
    """Run the stage in folder/run. say, progress: see `StageContext`."""
    module, recipe = prepare(kind, model, folder, **stage)
    context = StageContext(recipe, "stage", folder / "run", resume=resume, say=say, progress=progress)
    torch.manual_seed(context.seed)  # as the pipeline does: adapters are random
    result: StageResult = module.run(recipe.stages["stage"], context)
    return result


def build(
    kind: str,
    model: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    router: dict[str, float] | None = None,
    **stage: Any,
) -> Any:
    """The trainer that the stage's `run` creates; `router` overrides keys of the model's configuration."""
    made: list[Any] = []
    monkeypatch.setattr(KINDS[kind], "train_and_save", lambda trainer, *_: made.append(trainer))
    run_stage(kind, model, folder, **stage)
    (trainer,) = made
    assert len(trainer.train_dataset) == len(LENGTHS)
    for name, value in (router or {}).items():
        setattr(trainer.model.config, name, value)
    return trainer


class Keep(TrainerCallback):
    """Callback that keeps the step's gradients by parameter and its logged values."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.logs: dict[str, float] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradients = gradients(model)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs = {**logs, **self.logs}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_one_step(trainer: Any) -> Keep:
    kept = Keep()
    trainer.add_callback(kept)
    trainer.train()
    return kept


def gradient_of(trainer: Any) -> dict[str, Tensor]:
    """The gradient of the epoch's only step, without an update."""
    trainer.model.zero_grad(set_to_none=True)
    (step,) = trainer.get_train_dataloader()
    trainer.training_step(trainer.model, step)
    return gradients(trainer.model)


class Accelerator:
    """Stand-in for `Accelerator` on one of several ranks, which are threads of this process."""

    def __init__(self, real: Any, rank: int, ranks: int, exchange: Callable[[int, Any], list[Any]]):
        self.real, self.rank, self.num_processes, self.exchange = real, rank, ranks, exchange

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def gather(self, values: Any) -> Any:
        parts = self.exchange(self.rank, values)
        return torch.stack(parts) if parts[0].ndim == 0 else torch.cat(parts)

    def backward(self, loss: Tensor, **_: Any) -> None:
        loss.backward()

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        total = torch.stack(self.exchange(self.rank, values)).sum(0)
        return total / self.num_processes if reduction == "mean" else total


def mean_gradient_of_ranks(trainers: list[Any]) -> dict[str, Tensor]:
    """The gradient of the epoch's only step, averaged over ranks as DeepSpeed does; trainers: one per rank."""
    ranks = len(trainers)
    slots: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks, timeout=60)
    found: list[dict[str, Tensor]] = [{} for _ in trainers]

    def exchange(rank: int, values: Any) -> list[Any]:
        slots[rank] = values.detach().clone()
        barrier.wait()
        parts = list(slots)
        barrier.wait()
        return parts

    def work(rank: int) -> None:
        trainer = trainers[rank]
        properties = {"world_size": property(lambda _: ranks), "process_index": property(lambda _: rank)}
        trainer.args.__class__ = type("RankArguments", (type(trainer.args),), properties)
        trainer.accelerator = Accelerator(trainer.accelerator, rank, ranks, exchange)
        trainer.is_deepspeed_enabled = True
        found[rank] = gradient_of(trainer)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: sum(part[name] for part in found) / ranks for name in found[0]}
