"""Training of `pretrain`, `sft`, `reward_model`, `dpo` and `kto` stages: transformers' Trainer on packed passes.

transformers' Trainer runs the loop over epochs and optimizer steps, checkpoints and logging. An item of the data loader
is a whole optimizer step. `training_step` splits it into passes (`align.train.passes`), and runs forward and backward
pass of each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from align.config.parallel import Parallel
from align.config.stages import TrainingStage
from align.data.prepare import Prepared
from align.data.transfer import to_device, to_host
from align.models.lora.adapters import AnyModel
from align.models.weights import read_weights
from align.parallel.deepspeed_config import deepspeed_config
from align.run.context import StageContext
from align.train.device import peak_bytes, train_on_one_gpu
from align.train.objectives import Measured, Objective
from align.train.optimizer import build_optimizer, schedule_factor
from align.train.passes import Example, PackedPass, Part, Totals, parts_of_rank, totals_of
from align.train.steps import Examples, StepLoader, Steps, as_step, row_order

TRAINING_STATE = "training_state"
"""Subfolder of a checkpoint with the sharded training state of a run under DeepSpeed."""

WINDOW = 1024
"""Held-out rows that are packed together."""

LOADS = 200
"""Minimum number of steps at which the load of each expert is recorded, evenly spaced. A run of fewer steps records
every step."""

LOSS = "loss"


def trainer_arguments(stage: TrainingStage, context: StageContext) -> TrainingArguments:
    """The settings of transformers' Trainer. One of its batches is a whole optimizer step."""
    optimizer, parallel = stage.optimizer, context.recipe.parallel
    rows = stage.batch_size // (parallel.processes if parallel else 1)
    return TrainingArguments(
        output_dir=str(context.dir / "checkpoints"),
        seed=context.seed,
        data_seed=context.seed,
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps or -1,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=1,
        learning_rate=optimizer.learning_rate,
        max_grad_norm=optimizer.max_grad_norm,
        use_cpu=not torch.cuda.is_available(),
        bf16=context.recipe.dtype == "bfloat16",
        gradient_checkpointing=stage.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log a non-finite loss as 0
        save_strategy="steps",
        save_steps=stage.checkpoint_every,
        # With two checkpoints, a run killed while saving still has the previous one.
        save_total_limit=2,
        report_to="none",  # `fit` calls the trackers, with what metrics.jsonl receives
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        deepspeed=deepspeed_settings(parallel, stage, context.recipe.dtype, rows) if parallel else None,
    )


def deepspeed_settings(parallel: Parallel, stage: TrainingStage, dtype: str, rows: int) -> dict[str, Any]:
    """DeepSpeed's configuration; `training_step` tells the engine at which backward pass a step ends."""
    return deepspeed_config(
        parallel, micro_batch_size=rows, accumulation=1, max_grad_norm=stage.optimizer.max_grad_norm, dtype=dtype
    )


class PackedTrainer(Trainer):
    """transformers' Trainer for rows that are already tokenised.

    Its passes have no padding. Optimizer and schedule are the recipe's.

    A step's gradient does not depend on how its rows are split into passes and over ranks, except for the router's
    balance loss:

        cross entropy    sum over the loss tokens / loss tokens of the step
        losses of pairs  mean over the step's pairs
        z-loss           mean over the step's tokens
        balance loss     computed per pass, because it is a product of two means over tokens (expert load and
                         probability), then averaged with the passes' tokens as weights

    Under DeepSpeed every rank reads all rows of a step, and computes some of the passes.
    """

    model: AnyModel
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    objective: Objective

    def __init__(
        self,
        *,
        stage: TrainingStage,
        context: StageContext,
        objective: Objective,
        model: AnyModel,
        data: Prepared,
        processing_class: PreTrainedTokenizerBase,
        held_out_objective: Objective | None = None,
    ):
        """held_out_objective: `objective` of the held-out rows, if it depends on the data set."""
        self.align_stage, self.objective = stage, objective
        self.held_out_objective = held_out_objective or objective
        arguments = trainer_arguments(stage, context)
        train_on_one_gpu(arguments)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=processing_class,
        )
        if not objective.uses_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self._measured: dict[str, Tensor] = {}
        self.trained_tokens = 0  # of the training steps since the start, on all ranks
        self.expert_load: list[list[float]] | None = None  # of the last step, if it was recorded
        self._load: Tensor | None = None  # [layers, experts] of the step, if it is recorded
        self._clock = StepClock()
        self._held_out: list[Example] = []

    # --- data ---------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Loader of optimizer steps, the same on every rank."""
        order = row_order(self.align_stage, self.train_dataset, self.args.seed)
        steps = Steps(order, self.align_stage.batch_size)
        return StepLoader(Examples(self.train_dataset, self.objective), batch_sampler=steps, collate_fn=as_step)

    # --- passes -------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Accumulate the gradient of an optimizer step over its passes; returns the step's loss."""
        model.train()
        self._clock.start()
        self._load = None
        examples: list[Example] = inputs["examples"]
        totals = self._totals(model, examples, self.objective)
        self.trained_tokens += totals.tokens
        parts = self._parts(examples)
        measured = Sums()
        for number, part in enumerate(parts, start=1):
            # DeepSpeed reduces the gradients and steps after the backward pass that ends the step.
            self.accelerator.gradient_state._set_sync_gradients(number == len(parts))
            loss = self._measure(model, examples, part, totals, self.objective, measured)
            scale = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
            # DeepSpeed averages over the ranks.
            self.accelerator.backward(loss * self.args.world_size, **scale)
        loss, self._measured = measured.reduced(self.accelerator, self.args)
        self._load = self._reduced_load()
        return loss

    @property
    def _records_load(self) -> bool:
        """True in the steps whose load of each expert is recorded; the same on all ranks."""
        step, every = self.state.global_step + 1, max(1, self.state.max_steps // LOADS)
        return self.model.training and (step == 1 or step % every == 0)

    def _reduced_load(self) -> Tensor | None:
        """Share of the step's assignments of each expert [layers, experts]; None if it is not recorded."""
        if self._load is None:
            return None
        load = self._load if self.args.world_size == 1 else self.accelerator.reduce(self._load, "sum")
        return load / load.sum(dim=1, keepdim=True).clamp_min(1e-9)

    def _totals(self, model: Any, examples: Sequence[Example], objective: Objective) -> Totals:
        """Totals of a step, or of the held-out rows."""
        return totals_of(examples)

    def _parts(self, examples: Sequence[Example]) -> list[Part]:
        """This rank's passes."""
        capacity = self.align_stage.pass_tokens
        return list(parts_of_rank(examples, capacity, self.args.process_index, self.args.world_size))

    def _measure(
        self,
        model: Any,
        examples: Sequence[Example],
        part: Part,
        totals: Totals,
        objective: Objective,
        measured: Sums,
    ) -> Tensor:
        """Forward pass; adds its results to `measured` and returns its share of the step's loss."""
        packed = PackedPass([examples[item] for item in part.items], self.args.device)
        weight = float(part.counts)
        result: Measured = self._forward(model, objective.measure, packed, totals)
        loss, share = result.loss, packed.tokens / totals.tokens
        if result.router is not None:
            loss = loss + share * result.router.loss(self.model.config)
            result.means |= {
                name: (value * packed.tokens, packed.tokens) for name, value in result.router.metrics().items()
            }
            if self._records_load:
                load = packed.tokens * weight * torch.stack(result.router.load)
                self._load = load if self._load is None else self._load + load
        loss = loss * weight
        measured.add(result, loss, weight)
        return loss

    def _forward(self, model: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, ...), a forward pass."""
        with self.accelerator.autocast():
            if model is self.model:
                return function(model, *arguments)
            return model(function, *arguments)  # DeepSpeed's engine

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and metrics on the held-out rows, logged with the prefix `eval_`; router losses are not computed."""
        model, objective = self.model_wrapped, self.held_out_objective
        model.eval()
        if not self._held_out:
            self._held_out = list(
                map(Examples(self.eval_dataset, objective).__getitem__, range(len(self.eval_dataset)))
            )
        totals, measured = self._totals(model, self._held_out, objective), Sums()
        for start in range(0, len(self._held_out), WINDOW):
            window = self._held_out[start : start + WINDOW]
            for part in self._parts(window):
                self._measure(model, window, part, totals, objective, measured)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, others = measured.reduced(self.accelerator, self.args)
        values = {"loss": loss, **others}
        metrics = dict(zip((f"eval_{name}" for name in values), to_host(list(values.values())), strict=True))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log `logs`, and after an optimizer step its metrics; all metrics leave the device in one copy."""
        if "loss" in logs:
            logs |= self._to_host()
            logs |= self._clock.lap(self.trained_tokens) | {"memory/peak_gib": round(peak_bytes() / 2**30, 3)}
        else:
            self._clock.stop()
        super().log(logs, *args, **kwargs)

    def _to_host(self) -> dict[str, float]:
        """Metrics of the last step; `expert_load` becomes the shares of its experts. One transfer copies both."""
        load = self._load
        values = to_host([*self._measured.values(), *([] if load is None else [load.flatten()])])
        count = len(self._measured)
        shares, width = [round(share, 5) for share in values[count:]], 0 if load is None else load.shape[1]
        self.expert_load = [shares[i : i + width] for i in range(0, len(shares), width)] if width else None
        return dict(zip(self._measured, values[:count], strict=True))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: operations are not counted during training; `align plan` estimates them."""
        return 0

    # --- DeepSpeed, checkpoints, optimizer ----------------------------------------------------------------
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = model or self.model
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # The file uses the Hugging Face checkpoint's parameter names (one tensor per expert). `Trainer` would silently
        # skip the experts, because it does not know their names.
        read_weights(model, Path(resume_from_checkpoint))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        if not self.is_deepspeed_enabled:
            local: tuple[Any, Any] = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            return local
        # DeepSpeed runs its hooks only in the forward pass of the module that it wraps.
        self.model.forward = partial(_call, self.model)
        # DeepSpeed's own checkpoints can only be read by the same number of ranks.
        prepared: tuple[Any, Any] = super()._prepare_for_training(max_steps, train_dataloader, None)
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

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """Run an epoch unless all steps are done.

        If a run is resumed after its last step, transformers would train one more step.
        """
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **named)
        else:
            self.control.should_training_stop = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights. Under DeepSpeed this is a no-op: the checkpoint has them in `training_state`."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from align.parallel.state import save_training_state

        save_training_state(self.model_wrapped, Path(output_dir) / TRAINING_STATE)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            stage: TrainingStage = self.align_stage
            self.optimizer = build_optimizer(model or self.model, stage.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the recipe's schedule from `schedule_factor`, as PPO does; the first step's rate is above zero."""
        if self.lr_scheduler is None:
            stage: TrainingStage = self.align_stage
            settings = stage.optimizer
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: schedule_factor(step, num_training_steps, settings)
            )
        return self.lr_scheduler


class StepClock:
    """Measures the time from the end of one optimizer step to the end of the next, so that data loading counts.

    The time between `stop` and `start`, such as that of an evaluation, does not count.

    clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._tokens = clock, 0
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock before a step; a no-op if it runs."""
        if self._started is None:
            self._started = self._clock()

    def stop(self) -> None:
        self._started = None

    def lap(self, tokens: int) -> dict[str, float]:
        """Time and speed of the step that ends; empty if the clock was stopped. tokens: trained in all steps so far."""
        step_tokens, self._tokens = tokens - self._tokens, tokens
        if self._started is None:
            return {}
        now = self._clock()
        seconds, self._started = now - self._started, now
        return {"time/step": round(seconds, 4), "speed/train": round(step_tokens / max(seconds, 1e-9), 1)}


def _call(model: AnyModel, function: Any, *arguments: Any) -> Any:
    """Forward pass of a model under DeepSpeed: any function of the model."""
    return function(model, *arguments)


class Sums:
    """Loss and metrics summed over the passes of a rank."""

    def __init__(self) -> None:
        self.totals: dict[str, list[Tensor]] = {LOSS: []}
        self.counts: dict[str, float] = {}
        self.largest: dict[str, list[Tensor]] = {}

    def add(self, result: Measured, loss: Tensor, weight: float) -> None:
        """Add a pass. weight: 0 for a repeated pass."""
        self.totals[LOSS].append(loss.detach())
        for name, (total, count) in result.means.items():
            self.totals.setdefault(name, []).append(total.detach() * weight)
            self.counts[name] = self.counts.get(name, 0.0) + count * weight
        for name, value in result.largest.items():
            self.largest.setdefault(name, []).append(value.detach() if weight else torch.full_like(value, -math.inf))

    def reduced(self, accelerator: Any, args: TrainingArguments) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) over the passes of all ranks, as scalars on the device."""
        sums = torch.stack([torch.stack(values).double().sum() for values in self.totals.values()])
        largest = [torch.stack(values).amax() for values in self.largest.values()]
        counts = torch.tensor([1.0, *self.counts.values()], dtype=torch.float64)
        if args.world_size > 1:
            counts[0] = 1 / args.world_size
            sums, counts = accelerator.reduce(torch.stack((sums, to_device(counts, args.device))), "sum").unbind()
            if largest:
                largest = list(accelerator.gather(torch.stack(largest)[None]).amax(0).unbind())
        loss, *means = (sums / to_device(counts.clamp_min(1e-9), args.device)).unbind()
        extremes = {
            name: -value if name.startswith("min_") else value
            for name, value in zip(self.largest, largest, strict=True)
        }
        return loss.float(), dict(zip(self.counts, means, strict=True)) | extremes
