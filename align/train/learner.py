"""A model that a loop of our own trains: its optimizer, schedule and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from align.config.parts import Optimizer
from align.models.lora import AnyModel
from align.train.optimizer import build_optimizer, schedule_factor


class Learner:
    """A model and its optimizer.

    settings: AdamW's, and the schedule over `total` rounds. max_grad_norm: bound of the L2 norm of the gradient of all
    trained parameters.
    """

    def __init__(self, model: AnyModel, settings: Optimizer, *, total: int):
        self.model, self.settings, self.total = model, settings, total
        self.optimizer = build_optimizer(model, settings)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]

    def schedule(self, step: int) -> None:
        """The learning rate of round `step` (0-based)."""
        factor = schedule_factor(step, self.total, self.settings)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def ask(self, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """question(model, ...): whatever looks at the model does it through here."""
        return question(self.model, *arguments, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float | None:
        """Apply the gradients that were gathered; their norm before clipping, or None where it was not finite: then
        nothing is changed."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, self.settings.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.discard()
        return norm.item() if finite else None

    def discard(self) -> None:
        """Forget the gradients that were gathered."""
        self.optimizer.zero_grad(set_to_none=True)
