"""What our TRL trainers share: arguments from the recipe, optimizer groups, router metrics, resumable checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from align.config.parallel import Parallel
from align.config.stages import TrainingStage
from align.models.hunyuan import HunYuanModel
from align.models.hunyuan.checkpoint import read_weights
from align.models.hunyuan.moe import RouterReport
from align.models.lora.adapters import AnyModel
from align.parallel.deepspeed_config import accumulation_steps, deepspeed_config
from align.run.context import StageContext
from align.run.folder import MetricsWriter
from align.train.optimizer import build_optimizer, schedule_factor
from align.train.shared_batches import SHARE, SharedBatches, SharedLoader, gather_uneven
from align.train.trackers import tracker_arguments

TRAINING_STATE = "training_state"
"""Folder of a checkpoint that several processes write."""

COMPLETE = "complete"
"""A checkpoint without this file was cut off while it was written."""

NOT_METRICS = ("runtime", "per_second", "total_flos", "train_loss", "epoch", "num_tokens", "preparation_time")


def trainer_arguments(stage: TrainingStage, context: StageContext) -> dict[str, Any]:
    """Keyword arguments that every TRL config takes."""
    optimizer, parallel = stage.optimizer, context.recipe.parallel
    rows = stage.rows_a_pass(parallel.processes if parallel else 1)
    accumulation = accumulation_steps(parallel, stage.batch_size, rows)
    return {
        "output_dir": str(context.dir / "checkpoints"),
        "seed": context.seed,
        "data_seed": context.seed,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps or -1,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": optimizer.learning_rate,
        "max_grad_norm": optimizer.max_grad_norm,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": context.recipe.dtype == "bfloat16",
        "gradient_checkpointing": stage.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": stage.checkpoint_every,
        # Two, so that a kill while the second is written leaves the first.
        "save_total_limit": 2,
        **tracker_arguments(context.recipe, context.name),
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **(parallel_arguments(parallel, stage, context, rows, accumulation) if parallel else {}),
    }


def parallel_arguments(
    parallel: Parallel, stage: TrainingStage, context: StageContext, rows: int, accumulation: int
) -> dict[str, Any]:
    """What is added where the stage runs under DeepSpeed."""
    config = deepspeed_config(
        parallel,
        micro_batch_size=rows,
        accumulation=accumulation,
        max_grad_norm=stage.optimizer.max_grad_norm,
        dtype=context.recipe.dtype,
    )
    return {"deepspeed": config}


class AlignTrainer:
    """Mix-in put before a TRL trainer: tokenised data passes through untouched, the optimizer is the recipe's, and the
    router's losses are the model's own.

    TRL would compute Mixtral's balance loss over all layers at once; it is switched off (`router_aux_loss_coef=0` in
    `trainer_arguments`), and the typed output of our backbone is read by a hook instead.
    """

    def __init__(self: Any, *, stage: TrainingStage, model: AnyModel, **kwargs: Any):
        self.align_stage = stage
        coefficient = model.config.router_aux_loss_coef
        super().__init__(model=model, **kwargs)  # type: ignore[call-arg]  # the TRL trainer beside it
        # For adapters under ZeRO 3 TRL asks for torch's older way to recompute, which the model refuses.
        self.args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        # TRL writes its own setting into the configuration, which is saved with the model.
        model.config.router_aux_loss_coef = coefficient
        if self.is_deepspeed_enabled:
            self.accelerator.gather = gather_uneven(self.accelerator.gather)
        self.router: RouterReport | None = None
        for module in self.model.modules():
            if isinstance(module, HunYuanModel):
                module.register_forward_pre_hook(self._ask_for_routing, with_kwargs=True)
                module.register_forward_hook(self._keep_routing)

    def _ask_for_routing(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "output_router_logits": True}

    def _keep_routing(self, module: nn.Module, _: Any, output: Any) -> None:
        # The reference's forward runs without gradient and does not count.
        if torch.is_grad_enabled() and output.router is not None:
            self.router = output.router

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """The data layer has tokenised already, and counted what it dropped."""
        return dataset

    def _get_train_sampler(self: Any, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.align_stage.group_by_length:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        return LengthGroups(row_lengths(self.train_dataset), self.align_stage.batch_size, self.args.data_seed)

    def get_train_dataloader(self: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super().get_train_dataloader()  # type: ignore[misc]
        rows, stage, seed = self.train_dataset, self.align_stage, self.args.data_seed
        # The order in which accelerate gives the rows to a single process.
        order = self._get_train_sampler() if stage.group_by_length else SeedableRandomSampler(rows, data_seed=seed)
        batches = SharedBatches(
            order,
            micro_batch_size=self.args.per_device_train_batch_size,
            micro_batches=stage.batch_size // self.args.per_device_train_batch_size,
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        return SharedLoader(rows, batches, self.data_collator, pin_memory=self.args.dataloader_pin_memory)

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """An optimizer step's micro-batches. In an epoch's last step the last one may have fewer rows; each then counts
        by its rows, as `SharedBatches` has it for several processes."""
        micros, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        rows = [len(micro["input_ids"]) for micro in micros]
        if not self.is_deepspeed_enabled and len(set(rows)) > 1:
            for micro, own in zip(micros, rows, strict=True):
                micro[SHARE] = own * len(rows) / sum(rows)
        return micros, items

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = model or self.model
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        # The file has the published names. `Trainer` would silently skip those that it does not know: the experts.
        read_weights(model, Path(resume_from_checkpoint))

    def _prepare_for_training(
        self: Any, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[misc]
        # DeepSpeed's own checkpoints fit one number of processes.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if resume_from_checkpoint is not None:
            from align.parallel.state import load_training_state

            load_training_state(self.model_wrapped, Path(resume_from_checkpoint) / TRAINING_STATE)
            step = self.lr_scheduler.last_epoch = self.state.global_step
            factor = schedule_factor(step, max_steps, self.align_stage.optimizer)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        return prepared

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint of several processes holds the weights in its training state, and nowhere else."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        from align.parallel.state import save_training_state

        save_training_state(self.model_wrapped, Path(output_dir) / TRAINING_STATE)

    def create_optimizer(self: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.model, self.align_stage.optimizer)
        return self.optimizer

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The recipe's schedule, the same function as PPO's; the first step already has a rate above zero."""
        if self.lr_scheduler is None:
            settings = self.align_stage.optimizer
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: schedule_factor(step, num_training_steps, settings)
            )
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        self.router = None
        share = inputs.pop(SHARE, 1.0)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss, *outputs = result if return_outputs else (result,)
        if num_items_in_batch is None:
            loss = loss * share
        router = self.router
        if router is None:
            return (loss, *outputs) if return_outputs else loss
        # A loss that is divided by the step's tokens is not divided by its micro-batches again; this mean must be.
        parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = loss + share * router.loss(self.model.config) / parts
        for name, value in self._mean_over_ranks(router.metrics(), share).items():
            self._metrics["train"][name].append(value)
        return (loss, *outputs) if return_outputs else loss

    def _mean_over_ranks(self: Any, metrics: dict[str, float], share: float) -> dict[str, float]:
        if self.args.world_size == 1:
            return {name: share * value for name, value in metrics.items()}
        values = share * torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.args.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))


class LengthGroups(Sampler):
    """Random batches of rows of similar length; an epoch's order depends on the seed and the epoch alone."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each row; of a pair, those of its longer side."""
    ids = {name: dataset[name] for name in ("input_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names}
    return [max(len(side) for side in row) for row in zip(*ids.values(), strict=True)]


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, marks finished checkpoints, prints a line now and then."""

    def __init__(self, context: StageContext, writer: MetricsWriter | None):
        self.context, self.writer = context, writer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        metrics = {k: v for k, v in (logs or {}).items() if not any(part in k for part in NOT_METRICS)}
        if not metrics or self.writer is None:
            return
        self.writer.write(state.global_step, metrics)
        loss = f"  loss {metrics['loss']:.4f}" if "loss" in metrics else ""
        self.context.status(f"  step {state.global_step}/{state.max_steps}{loss}")
        if state.max_steps and (state.global_step % max(1, state.max_steps // 10) == 0 or "eval_loss" in metrics):
            shown = {
                k: metrics[k]
                for k in ("loss", "eval_loss", "accuracy", "rewards/accuracies", "eval_accuracy")
                if k in metrics
            }
            values = "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
            self.context.say(f"  step {state.global_step}/{state.max_steps}  {values}")

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.context.status("  evaluating on held-out rows")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    complete = [path for path in found if (path / COMPLETE).is_file()]
    for path in set(found) - set(complete):
        shutil.rmtree(path)
    return complete[-1] if complete else None


def find_checkpoint(context: StageContext) -> Path | None:
    """Where to resume; without it, whatever checkpoints there are belong to an earlier start and are removed."""
    checkpoint = last_checkpoint(context.dir / "checkpoints") if context.resume else None
    if checkpoint is None:
        shutil.rmtree(context.dir / "checkpoints", ignore_errors=True)
    return checkpoint


def fit(trainer: Any, context: StageContext) -> dict[str, float]:
    """Train from the start or from the last checkpoint; returns the metrics on held-out data before and after."""
    if context.recipe.parallel is None:
        checkpoint = find_checkpoint(context)
    else:
        from align.parallel.group import from_rank_0

        checkpoint = from_rank_0("find checkpoint", lambda: find_checkpoint(context))
    step = int(checkpoint.name.split("-")[1]) if checkpoint else None
    writer = None
    if trainer.args.process_index == 0:
        writer = MetricsWriter(context.dir / "metrics.jsonl", from_step=step)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder(context, writer))
    if checkpoint:
        context.say(f"  resuming at step {step}")
    elif trainer.eval_dataset is not None:
        if trainer.is_deepspeed_enabled:
            trainer.args.eval_on_start = True  # an engine of its own, only to evaluate, could not be trained any more
        else:
            trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    final = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if writer is not None:
        writer.close()
    return {k: v for k, v in final.items() if not any(part in k for part in NOT_METRICS)}
