"""Routers of the adopted families: what they decided in a forward pass, and replay of other decisions.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from align.models.routing import Routing


class RoutingPass:
    """Routing of one forward pass.

    replay: experts to use [T, layers, k], -1 leaves the choice to the router; None leaves all choices.
    routings: what the routers decided, by decoder layer.
    """

    def __init__(self, replay: Tensor | None):
        self.replay = replay
        self.routings: dict[int, Routing] = {}

    def wanted(self, layer: int, top_k: int) -> Tensor | None:
        return None if self.replay is None else self.replay[:, layer, :top_k].long()


CURRENT: ContextVar[tuple[RoutingPass, int] | None] = ContextVar("routing pass and layer", default=None)
"""The pass and the decoder layer that this thread computes. A context variable rather than an attribute of the model,
because passes through one model run in several threads."""


class ReportingRouter(nn.Module):
    """Mix-in before a router's class: reports to the current pass, and uses its experts."""

    top_k: int
    num_experts: int
    scores_by_sigmoid: bool

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Beside a model in bfloat16, a router that LoRA trains in full has float32 weights.
        device = hidden.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            hidden = hidden.to(next(self.parameters()).dtype)
        args = (hidden, *args)
        current = CURRENT.get()
        if current is None:
            return super().forward(*args, **kwargs)
        routing, layer = current
        wanted = routing.wanted(layer, self.top_k)
        with nullcontext() if wanted is None else Replay(wanted, self.num_experts):
            output = super().forward(*args, **kwargs)
        routing.routings[layer] = self.read(output)
        return output

    def read(self, output: Sequence[Tensor]) -> Routing:
        """The routing in the router's output."""
        return read_routing(output, sigmoid=self.scores_by_sigmoid)


class ScoringRouter(ReportingRouter):
    """Mix-in before the class of a router that returns scores [T, E], zero for experts that were not chosen, and
    logits [T, E]."""

    def read(self, output: Sequence[Tensor]) -> Routing:
        scores_TE, logits_TE = output
        weights_Tk, chosen_Tk = scores_TE.topk(self.top_k, dim=-1)
        weights_Tk = weights_Tk.float()
        return Routing(
            logits_TE.float(), chosen_Tk, chosen_Tk, weights_Tk, complete=True, sigmoid=self.scores_by_sigmoid
        )


def read_routing(output: Sequence[Tensor], *, sigmoid: bool) -> Routing:
    """The routing in a router's output: logits [T, E], weights [T, k] and indices [T, k], in any order.

    With k = E, logits are the values that come first, or last in families that return the indices first.
    """
    (indices,) = (value for value in output if not value.is_floating_point())
    first, second = (value for value in output if value.is_floating_point())
    logits_last = output[0] is indices if first.shape == second.shape else second.shape[1] > first.shape[1]
    logits, weights = (second, first) if logits_last else (first, second)
    return Routing(logits.float(), indices, indices, weights.float(), complete=True, sigmoid=sigmoid)


class Replay(TorchFunctionMode):
    """Replaces the result of a router's own top-k over all experts by the wanted experts and their scores.

    What the router computes from it follows by itself: weights, normalisation, scaling, gradient. A router that
    excludes groups of experts fills their scores first; wanted experts keep the scores from before.
    """

    def __init__(self, wanted_Tk: Tensor, experts: int):
        super().__init__()
        self.wanted, self.experts = wanted_Tk, experts
        self.unfilled: Tensor | None = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.masked_fill and self._over_experts(args[0]):
            self.unfilled = args[0]
        if function not in (torch.topk, Tensor.topk) or not self._over_experts(args[0]):
            return function(*args, **kwargs)
        if (args[1] if len(args) > 1 else kwargs["k"]) != self.wanted.shape[1]:
            return function(*args, **kwargs)
        own = function(*args, **kwargs)
        scores = args[0] if self.unfilled is None else self.unfilled
        replayed = self.wanted >= 0
        chosen = torch.where(replayed, self.wanted, own.indices)
        values = torch.where(replayed, scores.gather(-1, chosen), own.values)
        return torch.return_types.topk((values, chosen))

    def _over_experts(self, scores: Tensor) -> bool:
        return scores.shape == (len(self.wanted), self.experts)
