"""The routed experts of the adopted families as `align.models.experts.Experts`.

Shapes: T tokens, N rows sorted by expert, D hidden, E experts, k experts per token, F expert width, G = 2F.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from align.models.experts import Correction, ExpertRows, Experts
from align.models.swiglu import gated_halves


class AdoptedExperts(Experts):
    """Mix-in before the experts' class of a family: same parameters, our products.

    transformers describes the stacks of all its families by four switches, which its decorator sets: `is_transposed`
    [E, D, G] instead of [E, G, D], `has_bias`, `has_gate` (otherwise `up_proj` [E, F, D] alone) and a gate of its own
    (`_apply_gate`), for instance of interleaved or clamped halves.
    """

    act_fn: Callable[[Tensor], Tensor]
    is_transposed: bool
    has_bias: bool
    has_gate: bool

    @property
    def act(self) -> Callable[[Tensor], Tensor]:  # transformers calls it act_fn
        return self.act_fn

    def outputs(self, rows_ND: Tensor, division: ExpertRows, corrections: Mapping[str, Correction]) -> Tensor:
        """Like `expert_outputs`, of the experts on this rank."""

        def biased(name: str, rows: Tensor) -> Tensor:
            result = self.product(name, rows, division, corrections)
            return result + self._bias(name, division) if self.has_bias else result

        if not self.has_gate:
            return biased("down_proj", self.act_fn(biased("up_proj", rows_ND)))
        gate_up = biased("gate_up_proj", rows_ND)
        own_gate: Any = type(self)._apply_gate  # type: ignore[attr-defined]  # set by transformers' decorator
        if own_gate is _default_apply_gate:
            return biased("down_proj", gated_halves(self.act_fn, gate_up))
        return biased("down_proj", own_gate(self, gate_up))

    def _bias(self, name: str, division: ExpertRows) -> Tensor:
        """Bias of each row's expert; zero for rows without an expert."""
        bias_EO: Tensor = getattr(self, f"{name}_bias")
        row = torch.arange(division.total, device=bias_EO.device)
        expert = torch.searchsorted(division.ends_E, row, right=True)
        found = bias_EO.index_select(0, expert.clamp_max(len(bias_EO) - 1))
        return found if division.complete else found * (row < division.ends_E[-1])[:, None]


class TransposedExperts(AdoptedExperts):
    """Mix-in before an experts' class without transformers' switches, whose stacks are [E, D, G] and [E, F, D]."""

    is_transposed = True
    has_bias = False
    has_gate = True
    _apply_gate = _default_apply_gate


class InputWeighingMoe(nn.Module):
    """Mix-in before the class of an MoE block that multiplies the experts' inputs, not their outputs, by the routing
    weights (Llama 4). transformers' block computes every expert for every token, with zeros for experts that were not
    chosen; here only the chosen ones compute.
    """

    router: nn.Module
    experts: nn.Module
    shared_expert: nn.Module
    top_k: int

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(output [T, D], router logits [T, E])."""
        hidden_TD = hidden.flatten(0, -2)
        scores_TE, logits_TE = self.router(hidden_TD)
        weights_Tk, experts_Tk = scores_TE.topk(self.top_k, dim=-1)
        inputs_TkD = hidden_TD[:, None] * weights_Tk[..., None].to(hidden_TD.dtype)
        alone = experts_Tk.reshape(-1, 1)
        outputs = self.experts(inputs_TkD.flatten(0, 1), alone, torch.ones_like(alone, dtype=hidden_TD.dtype))
        return self.shared_expert(hidden_TD) + outputs.unflatten(0, experts_Tk.shape).sum(1), logits_TE
