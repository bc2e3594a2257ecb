"""A model that is only evaluated: a reference, a reward model, a checkpoint under evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from align.config.parallel import Parallel
from align.models.lora.adapters import AnyModel
from align.models.weights import published_weights


class FrozenModel:
    """A model without an optimizer, sharded over all ranks if the recipe has a `parallel` section.

    Under `parallel` both methods are collective: every rank must make the same calls in the same order.

    model: the model; its parameters are frozen here.
    dtype: precision of a sharded model's forward pass; without `parallel` the model's own dtype is used.
    """

    def __init__(self, model: AnyModel, parallel: Parallel | None = None, dtype: str = "float32"):
        self.model: AnyModel = model.requires_grad_(False)
        self._engine: Callable[..., Any] | None = None
        if parallel is not None:
            from align.parallel.engine import inference_engine  # imports DeepSpeed

            self._engine = inference_engine(model, parallel, dtype=dtype)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return function(model, ...)."""
        if self._engine is None:
            return function(self.model, *arguments, **options)
        return self._engine(function, *arguments, **options)

    def published_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight, with the names and shapes of the Hugging Face checkpoint.

        In a sharded run rank 0 yields full tensors and the other ranks yield nothing, but every rank must iterate to
        the end.
        """
        if self._engine is None:
            return published_weights(self.model)
        from align.train.sharded_learner import gathered_weights

        return gathered_weights(self.model)
