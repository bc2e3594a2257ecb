"""What our TRL trainers share: arguments from the recipe, learning-rate groups, router metrics, resumable checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from align.config.stages import TrainingStage
from align.models.hunyuan import HunYuanModel
from align.train.optimizer import build_optimizer
from align.train.run_folder import MetricsWriter, StageContext

COMPLETE = "complete"
"""A checkpoint without this file was cut off while it was written."""

NOT_METRICS = ("runtime", "per_second", "total_flos", "train_loss", "epoch", "num_tokens", "num_input_tokens_seen")


def trainer_arguments(context: StageContext) -> dict[str, Any]:
    """Keyword arguments that every TRL config takes."""
    stage: TrainingStage = context.stage
    optimizer = stage.optimizer
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "output_dir": str(context.dir / "checkpoints"),
        "seed": context.seed,
        "data_seed": context.seed,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps or -1,
        "per_device_train_batch_size": stage.micro_batch_size,
        "per_device_eval_batch_size": stage.micro_batch_size,
        "gradient_accumulation_steps": max(1, stage.batch_size // (stage.micro_batch_size * processes)),
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.schedule if optimizer.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": optimizer.warmup_fraction,
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": context.recipe.dtype == "bfloat16",
        "gradient_checkpointing": stage.gradient_checkpointing,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": stage.checkpoint_every,
        # Two, so that a kill while the second is written leaves the first.
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }


class AlignTrainer:
    """Mix-in put before a TRL trainer. `prepared` data passes through untouched; the recipe's optimizer is used."""

    align_stage: TrainingStage

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """The data layer has tokenised already, and counted what it dropped."""
        return dataset

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.model, self.align_stage.optimizer)
        return self.optimizer


class Recorder(TrainerCallback):
    """Writes metrics.jsonl with the router's load, marks finished checkpoints, prints a line now and then."""

    def __init__(self, context: StageContext, writer: MetricsWriter, model: nn.Module):
        self.context, self.writer = context, writer
        self.loads: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, HunYuanModel):
                module.register_forward_hook(self._keep_load)

    def _keep_load(self, module: nn.Module, _: Any, output: Any) -> None:
        if output.expert_load and module.training:
            self.loads.append(torch.stack([load * load.numel() for load in output.expert_load]))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        metrics = {k: v for k, v in (logs or {}).items() if not any(part in k for part in NOT_METRICS)}
        if not metrics:
            return
        if self.loads and "loss" in metrics:
            # 1 is a perfectly even load; E is all tokens on one expert.
            metrics["expert_load_max"] = torch.stack(self.loads).mean(0).max(-1).values.mean().item()
            self.loads.clear()
        self.writer.write(state.global_step, metrics)
        if state.max_steps and (state.global_step % max(1, state.max_steps // 10) == 0 or "eval_loss" in metrics):
            shown = {k: metrics[k] for k in ("loss", "eval_loss", "accuracy", "rewards/accuracies", "eval_accuracy") if k in metrics}
            values = "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
            self.context.say(f"  step {state.global_step}/{state.max_steps}  {values}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    complete = [path for path in found if (path / COMPLETE).is_file()]
    for path in set(found) - set(complete):
        shutil.rmtree(path)
    return complete[-1] if complete else None


def fit(trainer: Any, context: StageContext, model: nn.Module) -> dict[str, float]:
    """Train from the start or from the last checkpoint; returns the metrics on held-out data before and after."""
    checkpoint = last_checkpoint(context.dir / "checkpoints") if context.resume else None
    if checkpoint is None:
        shutil.rmtree(context.dir / "checkpoints", ignore_errors=True)
    step = int(checkpoint.name.split("-")[1]) if checkpoint else None
    writer = MetricsWriter(context.dir / "metrics.jsonl", from_step=step)
    trainer.add_callback(Recorder(context, writer, model))
    if checkpoint:
        context.say(f"  resuming at step {step}")
    elif trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    final = trainer.evaluate() if trainer.eval_dataset is not None else {}
    writer.close()
    return {k: v for k, v in final.items() if not any(part in k for part in NOT_METRICS)}
