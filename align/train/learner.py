"""A model that a loop of our own trains: its optimizer, schedule and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from align.config.parts import Optimizer
from align.models.lora.adapters import AnyModel
from align.train.optimizer import build_optimizer, schedule_factor
from align.train.state import trainable


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
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        finite = bool(torch.isfinite(norm))
        if finite:
            if norm > self.settings.max_grad_norm:  # a factor of one would cost a pass over all gradients
                nn.utils.clip_grads_with_norm_(trained, self.settings.max_grad_norm, norm)
            self.optimizer.step()
        self.discard()
        return norm.item() if finite else None

    def discard(self) -> None:
        """Forget the gradients that were gathered."""
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of each trained parameter, as far as this process holds it and in its best precision."""
        for name, parameter in trainable(self.model).items():
            yield name, parameter.detach()

    @torch.no_grad()
    def exchange(self, values: dict[str, Tensor]) -> None:
        """Give the trained parameters other values, by the names of `weights`; `values` gets those that were there."""
        for name, parameter in trainable(self.model).items():
            present = parameter.detach().to(torch.float32, copy=True)
            parameter.copy_(values[name])
            values[name] = present
