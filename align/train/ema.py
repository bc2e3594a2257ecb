"""The exponential moving average of what is trained of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from align.train.state import trainable


class Ema:
    """average <- decay * average + (1 - decay) * weights, of the trained parameters alone; kept in float32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {
            name: parameter.detach().float().clone() for name, parameter in trainable(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, parameter in trainable(model).items():
            self.average[name].lerp_(parameter.float(), 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights, for the length of a with block."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in trainable(model).items():
            present = parameter.detach().float().clone()
            parameter.copy_(self.average[name])
            self.average[name] = present
