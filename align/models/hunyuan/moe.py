"""The mixture-of-experts block: router, routed experts, shared expert.

Shapes: T tokens, D hidden, E experts, k experts a token, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from align.models.hunyuan.configuration import HunYuanConfig


class Routing(NamedTuple):
    """Where tokens go: `logits_TE` fp32, `experts_Tk` int64, `weights_Tk` fp32."""

    logits_TE: Tensor
    experts_Tk: Tensor
    weights_Tk: Tensor


def route(logits_TE: Tensor, top_k: int) -> Routing:
    """Pick each token's experts and their combine weights.

    One expert: its softmax probability, so that the router has a gradient. Several: their probabilities renormalised
    to sum to one (Hunyuan-Large report, section 2.2; the released code).
    """
    probabilities = logits_TE.softmax(dim=-1, dtype=torch.float32)
    weights, experts = probabilities.topk(top_k, dim=-1)
    if top_k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
    return Routing(logits_TE, experts, weights)


class Router(nn.Module):
    """Linear scores in fp32. The weight sits directly here, where expert parallelism looks for it."""

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.top_k = config.top_k_in(layer)
        self.weight = nn.Parameter(torch.empty(config.experts_in(layer), config.hidden_size))

    def forward(self, hidden_TD: Tensor) -> Routing:
        logits = nn.functional.linear(hidden_TD.float(), self.weight.float())
        return route(logits, self.top_k)


class Experts(nn.Module):
    """Routed SwiGLU experts, stored as stacked matrices."""

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.num_experts = config.experts_in(layer)
        width, hidden = config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Sum over a token's experts of weight * expert(token).

        Tokens are sorted by expert, so that each expert is one dense product over its own rows and no work is done for
        a token that an expert does not have.
        """
        top_k = experts_Tk.shape[1]
        order = experts_Tk.flatten().argsort(stable=True)
        token = order // top_k
        counts = torch.bincount(experts_Tk.flatten(), minlength=self.num_experts).tolist()
        outputs = []
        for expert, rows in enumerate(hidden_TD[token].split(counts)):
            # An expert without tokens still takes part, so that its gradient is zero and not missing.
            gate, up = nn.functional.linear(rows, self.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(nn.functional.linear(self.act(gate) * up, self.down_proj[expert]))
        weights = weights_Tk.flatten()[order].to(hidden_TD.dtype)
        weighted = torch.cat(outputs) * weights[:, None]
        return torch.zeros_like(hidden_TD).index_add(0, token, weighted)


class SwiGlu(nn.Module):
    """down(act(gate(x)) * up(x)): the dense MLP and the shared expert."""

    def __init__(self, config: HunYuanConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MoeBlock(nn.Module):
    """Shared expert plus weighted routed experts."""

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = Experts(config, layer)
        width = config.shared_width(layer)
        self.shared_mlp = SwiGlu(config, width) if width else None

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Routing]:
        hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        routing = self.gate(hidden_TD)
        output = self.experts(hidden_TD, routing.experts_Tk, routing.weights_Tk).view_as(hidden_BTD)
        if self.shared_mlp is not None:
            output = output + self.shared_mlp(hidden_BTD)
        return output, routing
