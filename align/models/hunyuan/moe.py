"""HunYuan's mixture-of-experts block: router with capacity and recycling, routed experts, shared expert.

Shapes: B sequences, T tokens, D hidden, E experts, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from align.models.experts import Experts
from align.models.hunyuan.configuration import HunYuanConfig
from align.models.routing import Routing
from align.models.swiglu import gated


def route(
    logits_TE: Tensor,
    top_k: int,
    place: Callable[[Tensor], Tensor] | None = None,
    replay_Tk: Tensor | None = None,
) -> Routing:
    """Choose each token's experts and their combine weights.

    k = 1: the weight is the softmax probability, so the router has a gradient. k > 1: the probabilities are
    renormalised to sum to one (Hunyuan-Large report, section 2.2; the released code).

    Args:
        logits_TE: Router logits, fp32.
        top_k: Experts per token.
        place: Capacity limit: maps the chosen experts [T, k] to those that compute the token, -1 if dropped. The weight
            of a recycled assignment is the token's probability for the new expert. A dropped assignment stays in the
            sum to which the weights are normalised, so the token's other weights sum to less than one.
        replay_Tk: Experts to use instead of the top k, except where -1. The weights, and with them the router's
            gradient, still come from these logits (routing replay, arXiv 2510.11370).
    """
    probabilities = logits_TE.softmax(dim=-1, dtype=torch.float32)
    weights, chosen = probabilities.topk(top_k, dim=-1)
    if replay_Tk is not None:
        chosen = torch.where(replay_Tk >= 0, replay_Tk, chosen)
        weights = probabilities.gather(1, chosen)
    experts = chosen
    if place is not None:
        experts = place(chosen)
        weights = probabilities.gather(1, torch.where(experts < 0, chosen, experts))
    if top_k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
    return Routing(logits_TE, chosen, experts, weights, complete=place is None)


def capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """Maximum number of assignments per expert."""
    return math.ceil(factor * top_k * tokens / num_experts)


def limit_capacity(
    experts_Tk: Tensor, num_experts: int, factor: float, *, recycle: bool, mask_T: Tensor | None = None
) -> Tensor:
    """Assignments [T, k] after the capacity limit; -1 if dropped.

    Assignments take slots in order: the first choices of all tokens, then the second choices, and so on. An assignment
    whose expert is full is dropped or, with `recycle`, takes a slot drawn uniformly from the free slots of all experts
    while there are any. Tokens whose `mask_T` is 0 take no slot. Random numbers come from torch's global generator,
    whose state activation checkpointing restores before it recomputes.
    Source: Hunyuan-Large report, section 2.2 and figure 2.
    """
    tokens, top_k = experts_Tk.shape
    flat = experts_Tk.T.flatten()
    slots: int | Tensor
    if mask_T is None:
        valid = torch.ones_like(flat, dtype=torch.bool)
        slots = capacity(factor, tokens, top_k, num_experts)
    else:
        valid = mask_T.bool().repeat(top_k)
        # The value of `capacity`, computed on the mask's device so that the host does not wait for the number of
        # tokens.
        slots = (factor * top_k * mask_T.bool().sum().double() / num_experts).ceil().long()
    # Padding is sorted into an extra bucket after the last expert.
    bucket, order = torch.where(valid, flat, num_experts).sort(stable=True)
    starts = torch.searchsorted(bucket, torch.arange(num_experts + 1, device=flat.device))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[bucket]
    placed = torch.where(valid & (rank < slots), flat, -1)
    if recycle:
        free_slots = (slots - starts.diff()).clamp_min(0)
        count = int(free_slots.sum())  # the only line that synchronizes with a GPU
        if count:
            free = torch.arange(num_experts, device=flat.device).repeat_interleave(free_slots, output_size=count)
            free = free[torch.randperm(count, device=flat.device)]
            waiting = valid & (rank >= slots)
            turn = waiting.cumsum(0) - 1
            placed = torch.where(waiting & (turn < count), free[turn.clamp(0, count - 1)], placed)
    return placed.view(top_k, tokens).T.contiguous()


class Router(nn.Module):
    """Linear router in fp32. Its parameter is `mlp.gate.weight`, which `layout` maps to the published name."""

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.top_k = config.top_k_in(layer)
        self.capacity_factor = config.capacity_factor_in(layer) if config.moe_drop_tokens else None
        self.recycle = config.moe_random_routing_dropped_token
        self.weight = nn.Parameter(torch.empty(config.experts_in(layer), config.hidden_size))

    def forward(self, hidden_TD: Tensor, mask_T: Tensor | None = None, replay_Tk: Tensor | None = None) -> Routing:
        """Route the tokens; the capacity limit applies in training only.

        Args:
            mask_T: 0 for padding, which takes no expert's capacity.
            replay_Tk: As in `route`.
        """
        with torch.autocast(hidden_TD.device.type, enabled=False):
            logits = nn.functional.linear(hidden_TD.float(), self.weight.float())
        if self.capacity_factor is None or not self.training:
            return route(logits, self.top_k, replay_Tk=replay_Tk)
        limit = partial(
            limit_capacity,
            num_experts=len(self.weight),
            factor=self.capacity_factor,
            recycle=self.recycle,
            mask_T=mask_T,
        )
        return route(logits, self.top_k, limit, replay_Tk)


class SwiGlu(nn.Module):
    """down(act(gate(x)) * up(x)): the dense MLP and the shared expert."""

    def __init__(self, config: HunYuanConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(gated(self.act, self.gate_proj(x), self.up_proj(x)))
        return output


class MoeBlock(nn.Module):
    """Shared expert plus weighted routed experts."""

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = Experts(
            config.experts_in(layer), config.hidden_size, config.intermediate_size, config.hidden_act
        )
        width = config.shared_width(layer)
        self.shared_mlp = SwiGlu(config, width) if width else None

    def forward(
        self, hidden_BTD: Tensor, mask_T: Tensor | None = None, replay_Tk: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Output [B, T, D] and the routing of the flattened batch.

        Args:
            mask_T: [B * T], 0 for padding.
            replay_Tk: As in `route`.
        """
        hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        routing = self.gate(hidden_TD, mask_T, replay_Tk)
        output = self.experts(hidden_TD, routing.experts_Tk, routing.weights_Tk, complete=routing.complete)
        output = output.view_as(hidden_BTD)
        if self.shared_mlp is not None:
            output = output + self.shared_mlp(hidden_BTD)
        return output, routing
