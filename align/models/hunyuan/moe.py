"""The mixture-of-experts block: router, routed experts, shared expert.

Shapes: T tokens, D hidden, E experts, k experts a token, F expert width, G = 2F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from align.losses.moe import balance_loss, expert_load, router_entropy, router_z_loss
from align.models.hunyuan.configuration import HunYuanConfig
from align.models.hunyuan.swiglu import gated, gated_halves

Correction = Callable[[Tensor, Tensor], Tensor]
"""(rows sorted by expert [N, I], their counts [E]) -> what is added to the rows' product with a stack [E, O, I]."""
NO_CORRECTIONS: Mapping[str, Correction] = {}


class Routing(NamedTuple):
    """Where tokens go: `logits_TE` fp32, `chosen_Tk` the router's choice, `experts_Tk` what is left of it under a
    capacity (-1: nowhere), both int64, and `weights_Tk` fp32."""

    logits_TE: Tensor
    chosen_Tk: Tensor
    experts_Tk: Tensor
    weights_Tk: Tensor


def route(
    logits_TE: Tensor,
    top_k: int,
    place: Callable[[Tensor], Tensor] | None = None,
    replay_Tk: Tensor | None = None,
) -> Routing:
    """Pick each token's experts and their combine weights.

    One expert: its softmax probability, so that the router has a gradient. Several: their probabilities renormalised
    to sum to one (Hunyuan-Large report, section 2.2; the released code). `place` maps the choice to where tokens go:
    a token that was moved is weighted by its own probability for the new expert, one that was dropped keeps its part
    of the sum.

    replay_Tk: experts to take instead of the best ones, where it is not -1; the weights, and with them the router's
    gradient, are still of these logits (routing replay, arXiv 2510.11370).
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
    return Routing(logits_TE, chosen, experts, weights)


def capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """Assignments that one expert may take."""
    return math.ceil(factor * top_k * tokens / num_experts)


def limit_capacity(
    experts_Tk: Tensor, num_experts: int, factor: float, *, recycle: bool, mask_T: Tensor | None = None
) -> Tensor:
    """Where tokens go when no expert takes more than its capacity: [T, k], -1 for nowhere.

    Assignments arrive in order, all first choices before all second ones. One that finds its expert full goes to a
    free slot drawn uniformly from all that are left (recycle), else nowhere. Tokens whose `mask_T` is 0 take no slot.
    Random numbers come from torch's global generator, which activation checkpointing rewinds.
    Source: Hunyuan-Large report, section 2.2 and figure 2.
    """
    tokens, top_k = experts_Tk.shape
    flat = experts_Tk.T.flatten()
    valid = torch.ones_like(flat, dtype=torch.bool) if mask_T is None else mask_T.bool().repeat(top_k)
    slots = capacity(factor, int(valid.sum()) // top_k, top_k, num_experts)
    # Padding is counted as an expert of its own, which has no capacity.
    bucket = torch.where(valid, flat, num_experts)
    counts = torch.bincount(bucket, minlength=num_experts + 1)
    order = bucket.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[bucket[order]]
    placed = torch.where(valid & (rank < slots), flat, -1)
    if recycle:
        waiting = (valid & (rank >= slots)).nonzero().squeeze(1)
        room = (slots - counts[:num_experts]).clamp_min(0)
        free = torch.arange(num_experts, device=flat.device).repeat_interleave(room)
        free = free[torch.randperm(len(free), device=flat.device)[: len(waiting)]]
        placed[waiting[: len(free)]] = free
    return placed.view(top_k, tokens).T.contiguous()


class Router(nn.Module):
    """Linear scores in fp32. The weight sits directly here, where expert parallelism looks for it."""

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.top_k = config.top_k_in(layer)
        self.capacity_factor = config.capacity_factor_in(layer) if config.moe_drop_tokens else None
        self.recycle = config.moe_random_routing_dropped_token
        self.weight = nn.Parameter(torch.empty(config.experts_in(layer), config.hidden_size))

    def forward(self, hidden_TD: Tensor, mask_T: Tensor | None = None, replay_Tk: Tensor | None = None) -> Routing:
        """mask_T: 0 for padding, which takes no expert's capacity. Capacity limits training only. replay_Tk: experts to
        take, as `route` has them."""
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


class Gather(torch.autograd.Function):
    """Each row `copies` times, in another order: row `order[i] // copies` is the i-th of the result.

    The gradient takes the inverse order and adds a row's copies up, where indexing's own would scatter one by one.
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows_ND.index_select(0, order.div(copies, rounding_mode="floor") if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        grads = grad_ND.index_select(0, *ctx.saved_tensors)
        return grads.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else grads, None, None, None


class SortedProduct(torch.autograd.Function):
    """x W_e^T for rows that are sorted by expert, `counts` of each; zero for those behind the last expert's.

    Every product writes into its part of one result, forward and backward. Written as a loop under autograd the
    parts would be copied together, and those of the weights' gradient are as large as all experts.
    """

    @staticmethod
    def forward(ctx: Any, rows_NI: Tensor, weights_EOI: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows_NI, weights_EOI)
        ctx.counts = counts
        return SortedProduct.product(rows_NI, weights_EOI.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_NI, weights_EOI = ctx.saved_tensors
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = SortedProduct.product(grad_NO, weights_EOI, ctx.counts)
        if ctx.needs_input_grad[1]:
            grad_weights = torch.empty_like(weights_EOI)
            # An expert without rows takes part, so that its gradient is zero and not missing.
            for rows, grad, out in zip(rows_NI.split(ctx.counts), grad_NO.split(ctx.counts), grad_weights):
                torch.mm(grad.T, rows, out=out)
        return grad_rows, grad_weights, None

    @staticmethod
    def product(rows_NI: Tensor, matrices_EIO: Tensor, counts: list[int]) -> Tensor:
        result = rows_NI.new_empty(len(rows_NI), matrices_EIO.shape[2])
        *parts, rest = result.split(counts)
        for rows, matrix, part in zip(rows_NI.split(counts), matrices_EIO, parts):
            if len(rows):
                torch.mm(rows, matrix, out=part)
        rest.zero_()
        return result


def mix_experts(
    hidden_TD: Tensor,
    experts_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    act: Callable[[Tensor], Tensor],
    corrections: Mapping[str, Correction] = NO_CORRECTIONS,
) -> Tensor:
    """Sum over a token's experts of weight * expert(token), [T, D]; -1 stands for no expert.

    Expert e is down_e(act(gate) * up), with (gate, up) the halves of gate_up_e(token). Tokens are sorted by expert, so
    that each expert is one dense product over its own rows and no work is done for a token that it does not have.
    """
    hidden_TD, gate_up_EGD, down_EDF = in_autocast_dtype(hidden_TD, gate_up_EGD, down_EDF)

    def compute(rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return expert_outputs(rows_ND, gate_up_EGD, down_EDF, act, counts_E, corrections)

    return mix_outputs(hidden_TD, experts_Tk, weights_Tk, len(gate_up_EGD), compute)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast would have them, which leaves products alone that write into given memory."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def expert_outputs(
    rows_ND: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    act: Callable[[Tensor], Tensor],
    counts_E: Tensor,
    corrections: Mapping[str, Correction] = NO_CORRECTIONS,
) -> Tensor:
    """Outputs [N, D] of rows that are sorted by expert; zero for those behind the last expert's. `corrections`: what
    adapters add to the outputs of `gate_up_proj` and of `down_proj`."""
    hidden = gated_halves(act, corrected("gate_up_proj", rows_ND, gate_up_EGD, counts_E, corrections))
    return corrected("down_proj", hidden, down_EDF, counts_E, corrections)


def corrected(
    name: str, rows_NI: Tensor, weights_EOI: Tensor, counts_E: Tensor, corrections: Mapping[str, Correction]
) -> Tensor:
    """The product with the stack `name`, [N, O], and what an adapter adds to it."""
    product = sorted_product(rows_NI, weights_EOI, counts_E)
    return product + corrections[name](rows_NI, counts_E) if name in corrections else product


def sorted_product(rows_NI: Tensor, weights_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """x W_e^T for rows that are sorted by expert, [N, O], in the way that suits the device; zero for those behind the
    last expert's."""
    aligned = weights_EOI.shape[1] % 8 == weights_EOI.shape[2] % 8 == 0  # to 16 bytes, as grouped products want it
    if rows_NI.is_cuda and rows_NI.dtype == torch.bfloat16 and aligned:
        return grouped_product(rows_NI, weights_EOI, counts_E)
    counts = counts_E.tolist()
    counts.append(len(rows_NI) - sum(counts))
    product: Tensor = SortedProduct.apply(rows_NI, weights_EOI, counts)
    return product


def grouped_product(rows_NI: Tensor, weights_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """As `sorted_product`, without waiting for the counts to reach the host."""
    ends = counts_E.cumsum(0).to(torch.int32)
    # What lies behind the last group is never written, neither in the product nor in its gradient.
    written = (torch.arange(len(rows_NI), device=rows_NI.device) < ends[-1])[:, None]
    product = nn.functional.grouped_mm(torch.where(written, rows_NI, 0), weights_EOI.transpose(1, 2), offs=ends)
    return torch.where(written, product, 0)


def mix_outputs(
    hidden_TD: Tensor,
    experts_Tk: Tensor,
    weights_Tk: Tensor,
    num_experts: int,
    compute: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """As `mix_experts`; `compute` takes rows sorted by expert and the experts' counts, wherever the experts are."""
    flat = experts_Tk.flatten()
    bucket = torch.where(flat < 0, num_experts, flat)  # tokens without an expert come last
    order, inverse = sorting(bucket)
    counts = torch.bincount(bucket, minlength=num_experts + 1)[:num_experts]
    outputs = compute(Gather.apply(hidden_TD, order, inverse, experts_Tk.shape[1]), counts)
    outputs_TkD = Gather.apply(outputs, inverse, order, 1).unflatten(0, experts_Tk.shape)
    return torch.einsum("tk,tkd->td", weights_Tk.to(outputs.dtype), outputs_TkD)


def sorting(keys_N: Tensor) -> tuple[Tensor, Tensor]:
    """The stable order that sorts keys, and its inverse."""
    order = keys_N.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


class Experts(nn.Module):
    """Routed SwiGLU experts, stored as stacked matrices."""

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.num_experts = config.experts_in(layer)
        width, hidden = config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act = ACT2FN[config.hidden_act]

    @property
    def held(self) -> slice:
        """The experts of the layer that this module has."""
        return slice(0, self.num_experts)

    def forward(self, hidden_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor, **corrections: Correction) -> Tensor:
        """As `mix_experts`; `corrections` as for `expert_outputs`."""
        return mix_experts(hidden_TD, experts_Tk, weights_Tk, self.gate_up_proj, self.down_proj, self.act, corrections)


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
        self.experts = Experts(config, layer)
        width = config.shared_width(layer)
        self.shared_mlp = SwiGlu(config, width) if width else None

    def forward(
        self, hidden_BTD: Tensor, mask_T: Tensor | None = None, replay_Tk: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """mask_T: 0 for padding, over all tokens of the batch; replay_Tk: experts to take, -1 for the router's own."""
        hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        routing = self.gate(hidden_TD, mask_T, replay_Tk)
        output = self.experts(hidden_TD, routing.experts_Tk, routing.weights_Tk).view_as(hidden_BTD)
        if self.shared_mlp is not None:
            output = output + self.shared_mlp(hidden_BTD)
        return output, routing


class RouterReport(NamedTuple):
    """What the routers did in one forward pass: means over MoE layers and valid tokens; scalars but for `load`.

    balance_loss and z_loss have a gradient. load: [E] a layer, of the routers' choice. entropy in nats. recycled and
    dropped: shares of the assignments that a full expert sent elsewhere or nowhere.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load: tuple[Tensor, ...]
    entropy: Tensor
    recycled: Tensor
    dropped: Tensor

    def loss(self, config: HunYuanConfig) -> Tensor:
        """What is added to the training loss."""
        return config.router_aux_loss_coef * self.balance_loss + config.router_z_loss_coef * self.z_loss

    def metrics(self) -> dict[str, float]:
        """For the log. expert_load_max: the busiest expert's load times E, averaged over layers; 1 is even."""
        load_max = torch.stack([load.max() * load.numel() for load in self.load]).mean()
        return {
            "aux_loss": self.balance_loss.item(),
            "router_z_loss": self.z_loss.item(),
            "router_entropy": self.entropy.item(),
            "expert_load_max": load_max.item(),
            "recycled_share": self.recycled.item(),
            "dropped_share": self.dropped.item(),
        }


def report_routing(routings: list[Routing], mask_T: Tensor) -> RouterReport:
    """Summarise the layers' routings; tokens whose mask is 0 do not count."""
    mask = mask_T.float()

    def mean(measure: Callable[[Routing], Tensor]) -> Tensor:
        return torch.stack([measure(routing) for routing in routings]).mean()

    def share(moved: Callable[[Routing], Tensor]) -> Tensor:
        return mean(lambda r: (moved(r) * mask[:, None]).sum() / (mask.sum() * r.chosen_Tk.shape[1]).clamp_min(1.0))

    balance = mean(lambda r: balance_loss(r.logits_TE, r.chosen_Tk, mask))
    z_loss = mean(lambda r: router_z_loss(r.logits_TE, mask))
    with torch.no_grad():
        return RouterReport(
            balance_loss=balance,
            z_loss=z_loss,
            load=tuple(expert_load(r.chosen_Tk, r.logits_TE.shape[-1], mask) for r in routings),
            entropy=mean(lambda r: router_entropy(r.logits_TE, mask)),
            recycled=share(lambda r: (r.experts_Tk != r.chosen_Tk) & (r.experts_Tk >= 0)),
            dropped=share(lambda r: r.experts_Tk < 0),
        )


def choices_of_layers(routings: list[Routing | None]) -> Tensor:
    """The routers' choice [T, layers, k], int16; -1 in layers without a router, and where a layer has fewer than the
    largest k."""
    known = [routing.chosen_Tk for routing in routings if routing is not None]
    width = max(chosen.shape[1] for chosen in known)
    table = known[0].new_full((len(known[0]), len(routings), width), -1, dtype=torch.int16)
    for layer, routing in enumerate(routings):
        if routing is not None:
            table[:, layer, : routing.chosen_Tk.shape[1]] = routing.chosen_Tk
    return table
