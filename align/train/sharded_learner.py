"""A learner whose model and optimizer DeepSpeed shards over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.parallel import Parallel
from align.config.parts import Optimizer
from align.models.family import family_of
from align.models.lora.adapters import AnyModel
from align.parallel.engine import discard_gradients, training_engine
from align.parallel.export import gathered
from align.parallel.sharding import world
from align.parallel.state import load_training_state, local_states, save_training_state, swap_weights
from align.train.learner import Learner, clip_and_step


class ShardedLearner(Learner):
    """A learner whose gradient is the sum over all ranks' backward passes, as if one process had run all of them."""

    collective = True

    def __init__(
        self,
        model: AnyModel,
        settings: Optimizer,
        *,
        total: int,
        parallel: Parallel,
        dtype: str,
        ema_decay: float | None = None,
    ):
        super().__init__(model, settings, total=total)
        self.engine = training_engine(
            model, self.optimizer, parallel, max_grad_norm=settings.max_grad_norm, dtype=dtype
        )
        self.engine.eval()
        # At ZeRO 0 in float32 DeepSpeed neither returns the gradient norm nor skips steps with a non-finite norm, so
        # `_step` clips the gradients and steps itself.
        self._steps_itself = self.engine.optimizer is self.optimizer
        self._offloaded = parallel.offload.optimizer is not None
        self.skips_overflow = dtype == "bfloat16"
        self.optimizer = self.engine.optimizer
        if ema_decay is not None:
            self.track_ema(ema_decay)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self.engine(function, *arguments, **options)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * world()[1])  # DeepSpeed averages over the ranks

    def _step(self) -> float | None:
        if self._steps_itself:
            self.engine.buffered_allreduce_fallback()
            norm = clip_and_step(self.model, self.optimizer, self.settings.max_grad_norm)
            self.discard()
            return norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else None

    def discard(self) -> None:
        discard_gradients(self.engine)

    def save(self, folder: Path) -> None:
        save_training_state(self.engine, folder, self._ema_shards())

    def load(self, folder: Path) -> None:
        load_training_state(self.engine, folder, self._ema_shards())

    def _ema_shards(self) -> dict[str, Tensor] | None:
        return None if self.ema_decay is None else self.ema

    def published_weights(self) -> Iterator[tuple[str, Tensor]]:
        return gathered_weights(self.model)

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, flat float32 shard) of each trained parameter; on the CPU if the optimizer is offloaded."""
        for held in local_states(self.engine):
            values = held.read("weight")
            yield held.name, values.cpu() if self._offloaded else values

    def exchange(self, values: dict[str, Tensor]) -> None:
        swap_weights(self.engine, values)


def gathered_weights(model: AnyModel) -> Iterator[tuple[str, Tensor]]:
    """Gather a sharded model on rank 0, tensor by tensor, under its published names.

    Collective: every rank must iterate to the end; only rank 0 yields tensors.
    """
    rank, _ = world()
    names = family_of(model.config).names(model.config)
    for name, tensor in gathered(model, getattr(model, "dtype", torch.float32)):
        if rank == 0:
            yield from names.published(name, tensor)
