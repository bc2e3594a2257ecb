"""Mix-in of align's TRL trainers: the recipe's optimizer and schedule, exact means over micro-batches and ranks, router
losses and metrics, sharded checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_length_grouped_indices

from align.config.parallel import Parallel
from align.config.stages import TrainingStage
from align.data.transfer import to_host
from align.models.family import family_of
from align.models.lora.adapters import AnyModel
from align.models.routing import RouterReport
from align.models.weights import read_weights
from align.parallel.deepspeed_config import accumulation_steps, deepspeed_config
from align.run.context import StageContext
from align.train.device import train_on_one_gpu
from align.train.optimizer import build_optimizer, schedule_factor
from align.train.shared_batches import ROW_WEIGHT, TOKEN_WEIGHT, SharedBatches, SharedLoader, gather_uneven
from align.train.trackers import tracker_arguments

TRAINING_STATE = "training_state"
"""Subfolder of a checkpoint in which a run under DeepSpeed saves its sharded training state."""


def trainer_arguments(stage: TrainingStage, context: StageContext) -> dict[str, Any]:
    """Keyword arguments for the TRL config of any training stage."""
    optimizer, parallel = stage.optimizer, context.recipe.parallel
    rows = stage.rows_per_pass(parallel.processes if parallel else 1)
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
        "logging_nan_inf_filter": False,  # it would log a non-finite loss as 0
        "save_strategy": "steps",
        "save_steps": stage.checkpoint_every,
        # With two checkpoints, a run killed while saving still has the previous one.
        "save_total_limit": 2,
        **tracker_arguments(context.recipe, context.name),
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **(parallel_arguments(parallel, stage, context, rows, accumulation) if parallel else {}),
    }


def parallel_arguments(
    parallel: Parallel, stage: TrainingStage, context: StageContext, rows: int, accumulation: int
) -> dict[str, Any]:
    """Additional keyword arguments for a run under DeepSpeed."""
    config = deepspeed_config(
        parallel,
        micro_batch_size=rows,
        accumulation=accumulation,
        max_grad_norm=stage.optimizer.max_grad_norm,
        dtype=context.recipe.dtype,
    )
    return {"deepspeed": config}


class AlignTrainer:
    """Mix-in that precedes a TRL trainer among the bases of a class: rows are already tokenised, optimizer and schedule
    are the recipe's, and the router losses come from the model's own output.

    A step's gradient does not depend on how its batch is split into micro-batches, accumulation steps and ranks, except
    that the balance loss depends on which rows share a micro-batch:

        cross entropy    sum over the loss tokens / loss tokens of the step
        losses of pairs  mean over the step's pairs
        z-loss           mean over the step's valid tokens
        balance loss     computed per micro-batch, because it is a product of two means over tokens (expert load and
                         probability), then averaged with the micro-batches' rows as weights

    TRL would add its own balance loss, computed as in Mixtral over all layers at once. recipes/{pretrain,sft,dpo}.py
    disable it with `router_aux_loss_coef=0`, and a forward hook reads the router statistics from the trunk's output.
    """

    def __init__(self: Any, *, stage: TrainingStage, model: AnyModel, **kwargs: Any):
        self.align_stage = stage
        coefficient = model.config.router_aux_loss_coef
        train_on_one_gpu(kwargs["args"])
        super().__init__(model=model, **kwargs)  # type: ignore[call-arg]  # the TRL trainer, next in the MRO
        # For adapters under ZeRO-3 TRL selects reentrant checkpointing, which the model refuses.
        self.args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        # TRL has overwritten the coefficient in the configuration, which is saved with the model.
        model.config.router_aux_loss_coef = coefficient
        if self.is_deepspeed_enabled:
            self.accelerator.gather = gather_uneven(self.accelerator.gather)
        self.router: RouterReport | None = None
        trunk = family_of(model.config).trunk
        for module in self.model.modules():
            if isinstance(module, trunk):
                module.register_forward_pre_hook(self._request_routing, with_kwargs=True)
                module.register_forward_hook(self._keep_routing)

    def _request_routing(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "output_router_logits": True}

    def _keep_routing(self, module: nn.Module, _: Any, output: Any) -> None:
        # Passes without gradient (the reference, evaluation) do not contribute router losses.
        if torch.is_grad_enabled() and output.router is not None:
            self.router = output.router

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """Return the rows unchanged: `align.data` has tokenised them and counted the dropped ones."""
        return dataset

    def _get_train_sampler(self: Any, train_dataset: Dataset | None = None) -> Sampler | None:
        stage: TrainingStage = self.align_stage
        if not stage.group_by_length:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        return LengthGroups(row_lengths(self.train_dataset), stage.batch_size, self.args.data_seed)

    def get_train_dataloader(self: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super().get_train_dataloader()  # type: ignore[misc]
        stage: TrainingStage = self.align_stage
        rows, seed = self.train_dataset, self.args.data_seed
        # The same order as accelerate uses in a run of one process.
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
        """Return this rank's micro-batches of an optimizer step, and set their weights in the step's means.

        In an epoch's last step the last micro-batch may have fewer rows. A mean over rows then needs a weight per
        micro-batch, proportional to its number of rows: ROW_WEIGHT, which is set here or, under DeepSpeed, by
        `SharedLoader`. TOKEN_WEIGHT is set if the recipe has a z-loss.
        """
        micros, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        rows = [len(micro["input_ids"]) for micro in micros]
        if not self.is_deepspeed_enabled and len(set(rows)) > 1:
            for micro, own in zip(micros, rows, strict=True):
                micro[ROW_WEIGHT] = own * len(rows) / sum(rows)
        if micros and self.model.config.router_z_loss_coef:
            self._set_weights(micros, TOKEN_WEIGHT, [int(micro["attention_mask"].sum()) for micro in micros])
        return micros, items

    def _set_weights(self: Any, micros: list[dict[str, Any]], key: str, counts: list[int]) -> None:
        """Set `micro[key]` = the micro-batch's count * number of micro-batches on all ranks / total count of the step.

        The weighted mean of the micro-batches' means is then the mean over all tokens that are counted in the step.
        """
        own = [count if micro.get(ROW_WEIGHT, 1.0) else 0 for micro, count in zip(micros, counts, strict=True)]
        total = torch.tensor(sum(own), device=self.args.device)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, "sum")
        for micro, count in zip(micros, own, strict=True):
            micro[key] = count * len(micros) * self.args.world_size / max(1, int(total))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = model or self.model
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        # The file uses the Hugging Face checkpoint's parameter names (one tensor per expert). `Trainer` would silently
        # skip the experts, because it does not know their names.
        read_weights(model, Path(resume_from_checkpoint))

    def _prepare_for_training(
        self: Any, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[misc]
        # DeepSpeed's own checkpoints can only be read by the same number of ranks.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if resume_from_checkpoint is not None:
            from align.parallel.state import load_training_state

            load_training_state(self.model_wrapped, Path(resume_from_checkpoint) / TRAINING_STATE)
            stage: TrainingStage = self.align_stage
            step = self.lr_scheduler.last_epoch = self.state.global_step
            factor = schedule_factor(step, max_steps, stage.optimizer)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        return prepared

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights. Under DeepSpeed this is a no-op: the checkpoint has them in `training_state`."""
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
            stage: TrainingStage = self.align_stage
            self.optimizer = build_optimizer(model or self.model, stage.optimizer)
        return self.optimizer

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Build the recipe's schedule from `schedule_factor`, as PPO does; the first step's rate is above zero."""
        if self.lr_scheduler is None:
            stage: TrainingStage = self.align_stage
            settings = stage.optimizer
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
        row_weight = inputs.pop(ROW_WEIGHT, 1.0)
        token_weight = inputs.pop(TOKEN_WEIGHT, row_weight)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss, *outputs = result if return_outputs else (result,)
        if num_items_in_batch is None:
            loss = loss * row_weight
        router = self.router
        if router is None:
            return (loss, *outputs) if return_outputs else loss
        # TRL does not divide by the accumulation steps when it normalises by num_items_in_batch. The router's losses
        # are means, so they are divided here.
        parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        config = self.model.config
        balance = row_weight * (config.router_aux_loss_coef * router.balance_loss)
        loss = loss + (balance + token_weight * (config.router_z_loss_coef * router.z_loss)) / parts
        for name, value in self._mean_over_ranks(router.metrics(), row_weight).items():
            self._metrics["train"][name].append(value)
        return (loss, *outputs) if return_outputs else loss

    def _mean_over_ranks(self: Any, metrics: dict[str, Tensor], weight: float = 1.0) -> dict[str, Tensor]:
        """Means over ranks of `weight` * value, as float64 scalars on the device; `log` copies them to the CPU."""
        values = weight * torch.stack([value.detach() for value in metrics.values()]).double()
        if self.args.world_size > 1:
            values = self.accelerator.reduce(values, "mean")
        return dict(zip(metrics, values.unbind(), strict=True))

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log `logs` and the metrics since the last log; all metrics leave the device in one copy."""
        kept = [values for metrics in self._metrics.values() for values in metrics.values()]
        waiting = [(values, i) for values in kept for i, value in enumerate(values) if isinstance(value, Tensor)]
        for (values, i), number in zip(waiting, to_host([values[i] for values, i in waiting]), strict=True):
            values[i] = number
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class LengthGroups(Sampler):
    """Sampler that puts rows of similar length into the same batch, in random order.

    An epoch's order depends only on the seed and the epoch's number.
    """

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
    """Tokens per row; for a pair, the tokens of its longer side, which for DPO exclude the prompt."""
    ids = {name: dataset[name] for name in ("input_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names}
    return [max(len(side) for side in row) for row in zip(*ids.values(), strict=True)]
