"""The exponential moving average of what is trained of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from align.train.learner import Learner


class Ema:
    """average <- decay * average + (1 - decay) * weights, of the trained parameters alone; kept in float32.

    Where ranks train the model together, each averages what it holds of it.
    """

    def __init__(self, learner: Learner, decay: float):
        self.learner, self.decay = learner, decay
        self.average: dict[str, Tensor] = {
            name: weights.to(torch.float32, copy=True) for name, weights in learner.weights()
        }

    @torch.no_grad()
    def update(self) -> None:
        for name, weights in self.learner.weights():
            self.average[name].lerp_(weights.float(), 1 - self.decay)

    def exchange(self) -> None:
        """Give the model the averaged weights, and keep its own in their place; a second call undoes the first."""
        self.learner.exchange(self.average)
