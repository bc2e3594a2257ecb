"""A model that all ranks train together in a loop of our own, under DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from align.config.parallel import Parallel
from align.config.parts import Optimizer
from align.models.lora.adapters import AnyModel
from align.parallel.sharding import world
from align.train.learner import Learner


class SpreadLearner(Learner):
    """`Learner` whose gradient is the sum over all ranks' passes, as if one process had done them all.

    Every rank asks, goes backward and steps as often as the others.
    """

    def __init__(self, model: AnyModel, settings: Optimizer, *, total: int, parallel: Parallel, dtype: str):
        from align.parallel.engine import learning_engine

        super().__init__(model, settings, total=total)
        self.engine = learning_engine(
            model, self.optimizer, parallel, max_grad_norm=settings.max_grad_norm, dtype=dtype
        )
        self.engine.eval()
        # At ZeRO 0 in float32 DeepSpeed clips by a norm that it does not tell, and steps where that is not finite.
        self.steps_alone = self.engine.optimizer is self.optimizer
        self.offloaded = parallel.offload.optimizer is not None
        self.optimizer = self.engine.optimizer

    def ask(self, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self.engine(question, *arguments, **options)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * world()[1])  # DeepSpeed takes the mean over the ranks

    def step(self) -> float | None:
        if self.steps_alone:
            self.engine.buffered_allreduce_fallback()
            return super().step()
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else None

    def discard(self) -> None:
        from align.parallel.engine import forget_gradients

        forget_gradients(self.engine)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Flat, in float32, and in the host's memory where the optimizer is there."""
        from align.parallel.state import held_parameters

        for held in held_parameters(self.engine):
            values = held.read("weight")
            yield held.name, values.cpu() if self.offloaded else values

    def exchange(self, values: dict[str, Tensor]) -> None:
        from align.parallel.state import exchange_weights

        exchange_weights(self.engine, values)


def frozen_engine(model: AnyModel, parallel: Parallel | None, dtype: str) -> Callable[..., Any]:
    """asked(question, ...) for a model that does not learn; under `parallel` all ranks ask it together."""
    if parallel is None:
        return lambda question, *arguments: question(model, *arguments)
    from align.parallel.engine import asking_engine

    engine: Callable[..., Any] = asking_engine(model, parallel, dtype=dtype)
    return engine
