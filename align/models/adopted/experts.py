"""The routed experts of the adopted families as `align.models.experts.Experts`.

Shapes: N rows sorted by expert, D hidden, E experts, F expert width, G = 2F.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import _default_apply_gate

from align.models.experts import Correction, ExpertRows, Experts, corrected, in_autocast_dtype
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

        def product(name: str, rows: Tensor) -> Tensor:
            rows, stack = in_autocast_dtype(rows, getattr(self, name))
            result = corrected(name, rows, stack.mT if self.is_transposed else stack, division, corrections)
            return result + self._bias(name, division) if self.has_bias else result

        if not self.has_gate:
            return product("down_proj", self.act_fn(product("up_proj", rows_ND)))
        gate_up = product("gate_up_proj", rows_ND)
        own_gate: Any = type(self)._apply_gate  # type: ignore[attr-defined]  # set by transformers' decorator
        if own_gate is _default_apply_gate:
            return product("down_proj", gated_halves(self.act_fn, gate_up))
        return product("down_proj", own_gate(self, gate_up))

    def _bias(self, name: str, division: ExpertRows) -> Tensor:
        """Bias of each row's expert; zero for rows without an expert."""
        bias_EO: Tensor = getattr(self, f"{name}_bias")
        row = torch.arange(division.total, device=bias_EO.device)
        expert = torch.searchsorted(division.ends_E, row, right=True)
        found = bias_EO.index_select(0, expert.clamp_max(len(bias_EO) - 1))
        return found if division.complete else found * (row < division.ends_E[-1])[:, None]
