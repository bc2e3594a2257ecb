"""A model that align's own training loop updates: forward and backward passes, optimizer, EMA weights, checkpoint.

`build_learner` returns a `LocalLearner`, which holds the whole model, or a `ShardedLearner`, whose model and optimizer
are sharded over all ranks. Both have the interface of `Learner`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.config.parallel import Parallel
from align.config.parts import Optimizer
from align.models.lora.adapters import AnyModel
from align.models.weights import published_weights
from align.train.optimizer import build_optimizer, schedule_factor
from align.train.state import load_local_learner, save_local_learner, trainable


def build_learner(
    model: AnyModel,
    settings: Optimizer,
    *,
    total: int,
    parallel: Parallel | None = None,
    dtype: str = "float32",
    ema_decay: float | None = None,
) -> Learner:
    """Build the learner of `model`: sharded over all ranks if the recipe has a `parallel` section, otherwise local.

    settings: AdamW, gradient clipping, and the learning-rate schedule over `total` steps.
    dtype: precision of the forward pass. In bfloat16 a local learner uses autocast over float32 trained weights, and a
        sharded learner holds bfloat16 weights and float32 master weights.
    ema_decay: decay of the EMA weights; None: no EMA weights are kept.
    """
    if parallel is None:
        return LocalLearner(model, settings, total=total, dtype=dtype, ema_decay=ema_decay)
    from align.train.sharded_learner import ShardedLearner  # imports DeepSpeed

    return ShardedLearner(model, settings, total=total, parallel=parallel, dtype=dtype, ema_decay=ema_decay)


class Learner(ABC):
    """A model, its optimizer and, if requested, its EMA weights.

    Gradients accumulate over calls of `backward` until `step` or `discard`. If the learner is sharded, every rank must
    call its methods in the same order and equally often.

    collective: forward and backward passes contain collectives, so two passes cannot run in parallel threads.
    skips_overflow: gradients are computed in bf16 and may overflow in single steps, which are then skipped.
    skips_in_a_row: number of successive skipped steps up to the last step; 0 if the last step was applied.
    """

    collective = False
    skips_overflow = False

    def __init__(self, model: AnyModel, settings: Optimizer, *, total: int):
        self.model, self.settings, self.total = model, settings, total
        self.optimizer = build_optimizer(model, settings)
        self.ema_decay: float | None = None
        self.ema: dict[str, Tensor] = {}
        self.skips_in_a_row = 0
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]

    def schedule(self, step: int) -> None:
        """Set the learning rate of step `step` (0-based)."""
        factor = schedule_factor(step, self.total, self.settings)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    @abstractmethod
    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return function(model, ...). Every forward pass must use this method, so that ZeRO can gather parameters."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`. The total gradient is the sum over all calls and ranks."""

    def step(self) -> float | None:
        """Clip and apply the accumulated gradients, then clear them.

        Returns the gradient norm before clipping, or None if the norm was not finite and the step was skipped.
        """
        norm = self._step()
        self.skips_in_a_row = 0 if norm is not None else self.skips_in_a_row + 1
        return norm

    @abstractmethod
    def _step(self) -> float | None:
        """Implement `step`, except for counting skipped steps."""

    @abstractmethod
    def discard(self) -> None:
        """Clear the accumulated gradients."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write trained weights, optimizer state and EMA weights into `folder`."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises `UserError` if a local learner is to load a sharded learner's files, or the reverse.
        """

    @abstractmethod
    def published_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight, adapters merged, with the names and shapes of the Hugging Face checkpoint.

        In a sharded run rank 0 yields full tensors and the other ranks yield nothing, but every rank must iterate to
        the end.
        """

    @abstractmethod
    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of each trained parameter: this rank's shard, in the precision of the optimizer."""

    @abstractmethod
    def exchange(self, values: dict[str, Tensor]) -> None:
        """Swap the trained parameters with `values`, which are keyed by the names of `trained_weights`."""

    # --- EMA weights ------------------------------------------------------------------------------------------

    def track_ema(self, decay: float) -> None:
        """Initialise the EMA weights with the current weights.

        Each `update_ema` then sets ema <- decay * ema + (1 - decay) * weights. EMA weights are kept in float32, for
        trained parameters only; each rank keeps those of its shard.
        """
        self.ema_decay = decay
        self.ema = {name: weights.to(torch.float32, copy=True) for name, weights in self.trained_weights()}

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the EMA weights towards the current weights; a no-op without EMA weights."""
        if self.ema_decay is not None:
            for name, weights in self.trained_weights():
                self.ema[name].lerp_(weights.float(), 1 - self.ema_decay)

    def swap_ema(self) -> None:
        """Swap the model's weights with the EMA weights, if any; a second call undoes the first."""
        if self.ema_decay is not None:
            self.exchange(self.ema)


class LocalLearner(Learner):
    """A learner whose process holds the whole model.

    dtype: precision of the forward pass. bfloat16 uses autocast, and trained weights must then be float32.
    """

    def __init__(
        self,
        model: AnyModel,
        settings: Optimizer,
        *,
        total: int,
        dtype: str = "float32",
        ema_decay: float | None = None,
    ):
        super().__init__(model, settings, total=total)
        self.dtype: torch.dtype = getattr(torch, dtype)
        if ema_decay is not None:
            self.track_ema(ema_decay)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.dtype == torch.float32:
            return function(self.model, *arguments, **options)
        device = next(self.model.parameters()).device.type
        # Autocast's cache would share the cast weights between passes in parallel threads. A pass uses each weight
        # once, so the cache would save nothing.
        with torch.autocast(device, self.dtype, cache_enabled=False):
            return function(self.model, *arguments, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def _step(self) -> float | None:
        norm = clip_and_step(self.model, self.optimizer, self.settings.max_grad_norm)
        self.discard()
        return norm

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        save_local_learner(folder, self.model, self.optimizer, self.ema)

    def load(self, folder: Path) -> None:
        load_local_learner(folder, self.model, self.optimizer, self.ema)

    def published_weights(self) -> Iterator[tuple[str, Tensor]]:
        return published_weights(self.model)

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trainable(self.model).items():
            yield name, parameter.detach()

    @torch.no_grad()
    def exchange(self, values: dict[str, Tensor]) -> None:
        for name, parameter in trainable(self.model).items():
            present = parameter.detach().to(torch.float32, copy=True)
            parameter.copy_(values[name])
            values[name] = present


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float | None:
    """Clip the L2 norm of all gradients to `max_grad_norm` and step.

    Returns the norm before clipping, or None if the norm was not finite and the step was skipped.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    on_host = norm.item()  # read once: each read waits for the GPU
    if not math.isfinite(on_host):
        return None
    if on_host > max_grad_norm:  # scaling by 1 would still read and write all gradients
        nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    optimizer.step()
    return on_host
