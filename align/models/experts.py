"""Routed experts as stacked matrices: grouped matrix products over rows sorted by expert, and their gradients.

Shapes: T tokens, D hidden, E experts, k experts per token, F expert width, G = 2F; N rows sorted by expert, I inputs
and O outputs of a stacked matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from align.models.swiglu import gated_halves


@dataclass
class ExpertRows:
    """Division of N rows, sorted by expert, into one group per expert. Rows without an expert come last.

    ends_E: end index (exclusive) of each expert's rows, int32.
    total: N.
    complete: True if every row has an expert; False if that is not known.
    on_host: number of rows per expert, then of rows without an expert; None until `counts` copies them to the host.
    """

    ends_E: Tensor
    total: int
    complete: bool = False
    on_host: list[int] | None = None

    @property
    def counts(self) -> list[int]:
        """Number of rows per expert, then of rows without an expert. The first access synchronizes with the GPU."""
        if self.on_host is None:
            self.on_host = [end - start for start, end in pairwise((0, *self.ends_E.tolist(), self.total))]
        return self.on_host


Correction = Callable[[Tensor, ExpertRows], Tensor]
"""(rows [N, I] sorted by expert, their division) -> values [N, O] that are added to the product with stacked
weights."""
NO_CORRECTIONS: Mapping[str, Correction] = {}


class Gather(torch.autograd.Function):
    """Repeat each row `copies` times and reorder: result row i is input row `order[i] // copies`.

    The backward pass gathers with the inverse order and sums the copies. The backward pass of torch's indexing would
    scatter rows one by one.
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
    """x W_e^T for rows sorted by expert; zero for rows without an expert.

    counts: number of rows per expert, then of rows without an expert.

    In both directions each expert's product is written into its slice of one result tensor. A loop under autograd would
    concatenate the slices; those of the weights' gradient are as large as the weights of all experts.
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
            # Experts without rows are included: for them torch.mm overwrites the uninitialised memory with zeros.
            for rows, grad, out in zip(rows_NI.split(ctx.counts), grad_NO.split(ctx.counts), grad_weights):
                torch.mm(grad.T, rows, out=out)
        return grad_rows, grad_weights, None

    @staticmethod
    def product(rows_NI: Tensor, matrices_EIO: Tensor, counts: list[int]) -> Tensor:
        """Product [N, O] of each row with its expert's matrix."""
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
    *,
    complete: bool = False,
) -> Tensor:
    """Output [T, D]: per token the sum over its experts of weight * expert(token); -1 in `experts_Tk` means no expert.

    complete: True if `experts_Tk` has no -1; False if that is not known.
    Expert e is down_e(act(gate) * up), where (gate, up) are the halves of gate_up_e(token). Tokens are sorted by
    expert, so that each expert computes dense products over its own rows.
    """
    hidden_TD, gate_up_EGD, down_EDF = in_autocast_dtype(hidden_TD, gate_up_EGD, down_EDF)

    def compute(rows_ND: Tensor, division: ExpertRows) -> Tensor:
        return expert_outputs(rows_ND, gate_up_EGD, down_EDF, act, division, corrections)

    return mix_outputs(hidden_TD, experts_Tk, weights_Tk, len(gate_up_EGD), compute, complete=complete)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to autocast's dtype under autocast, which itself does not cast for products with an `out` tensor."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def expert_outputs(
    rows_ND: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    act: Callable[[Tensor], Tensor],
    division: ExpertRows,
    corrections: Mapping[str, Correction] = NO_CORRECTIONS,
) -> Tensor:
    """Outputs [N, D] of rows sorted by expert; zero for rows without an expert.

    corrections: functions, by the names `gate_up_proj` and `down_proj`, whose values adapters add to these products.
    """
    hidden = gated_halves(act, corrected("gate_up_proj", rows_ND, gate_up_EGD, division, corrections))
    return corrected("down_proj", hidden, down_EDF, division, corrections)


def corrected(
    name: str, rows_NI: Tensor, weights_EOI: Tensor, division: ExpertRows, corrections: Mapping[str, Correction]
) -> Tensor:
    """Product [N, O] of the rows with the stacked weights `name`, plus the correction of their adapter, if any."""
    product = sorted_product(rows_NI, weights_EOI, division)
    return product + corrections[name](rows_NI, division) if name in corrections else product


def sorted_product(rows_NI: Tensor, weights_EOI: Tensor, division: ExpertRows) -> Tensor:
    """x W_e^T [N, O] for rows sorted by expert; zero for rows without an expert.

    Uses one grouped kernel for bf16 on a GPU if the sizes are aligned, otherwise a loop over the experts.
    """
    aligned = weights_EOI.shape[1] % 8 == weights_EOI.shape[2] % 8 == 0  # rows of 16-byte multiples, for grouped_mm
    if rows_NI.is_cuda and rows_NI.dtype == torch.bfloat16 and aligned:
        return grouped_product(rows_NI, weights_EOI, division)
    product: Tensor = SortedProduct.apply(rows_NI, weights_EOI, division.counts)
    return product


def grouped_product(rows_NI: Tensor, weights_EOI: Tensor, division: ExpertRows) -> Tensor:
    """Like `sorted_product`, by one grouped kernel, which does not need the counts on the host."""
    ends, weights_EIO = division.ends_E, weights_EOI.transpose(1, 2)
    if division.complete:
        return nn.functional.grouped_mm(rows_NI, weights_EIO, offs=ends)
    # grouped_mm leaves rows after the last group uninitialised, in the product and in the gradient of the rows.
    written = (torch.arange(len(rows_NI), device=rows_NI.device) < ends[-1])[:, None]
    product = nn.functional.grouped_mm(torch.where(written, rows_NI, 0), weights_EIO, offs=ends)
    return torch.where(written, product, 0)


def mix_outputs(
    hidden_TD: Tensor,
    experts_Tk: Tensor,
    weights_Tk: Tensor,
    num_experts: int,
    compute: Callable[[Tensor, ExpertRows], Tensor],
    *,
    complete: bool = False,
) -> Tensor:
    """Like `mix_experts`, with outputs from `compute`, which maps (rows sorted by expert, their division) to outputs.

    With expert parallelism `compute` also dispatches rows to other ranks.
    """
    bucket = experts_Tk.flatten()
    if not complete:
        bucket = torch.where(bucket < 0, num_experts, bucket)  # assignments without an expert come last
    sorted_N, order, inverse = sorting(bucket)
    experts = torch.arange(num_experts, device=bucket.device)
    # `bincount` would synchronize the host with a GPU.
    ends = torch.searchsorted(sorted_N, experts, right=True, out_int32=True)
    division = ExpertRows(ends, len(bucket), complete)
    outputs = compute(Gather.apply(hidden_TD, order, inverse, experts_Tk.shape[1]), division)
    outputs_TkD = Gather.apply(outputs, inverse, order, 1).unflatten(0, experts_Tk.shape)
    return torch.einsum("tk,tkd->td", weights_Tk.to(outputs.dtype), outputs_TkD)


def sorting(keys_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys, sorted stably; the permutation that sorts them; and its inverse."""
    sorted_N, order = keys_N.sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return sorted_N, order, inverse


class Experts(nn.Module):
    """Routed SwiGLU experts of one layer, stored as `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F].

    is_transposed: True in a subclass whose stacks are [E, D, 2F] and [E, F, D].
    """

    is_transposed = False

    def __init__(self, num_experts: int, hidden_size: int, width: int, activation: str):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.act = ACT2FN[activation]

    @property
    def local_experts(self) -> slice:
        """Indices of the layer's experts whose weights are on this rank; without expert parallelism, all."""
        return slice(0, self.num_experts)

    def outputs(self, rows_ND: Tensor, division: ExpertRows, corrections: Mapping[str, Correction]) -> Tensor:
        """Like `expert_outputs`, of the experts on this rank."""
        hidden = gated_halves(self.act, self.product("gate_up_proj", rows_ND, division, corrections))
        return self.product("down_proj", hidden, division, corrections)

    def product(
        self, name: str, rows_NI: Tensor, division: ExpertRows, corrections: Mapping[str, Correction]
    ) -> Tensor:
        """Product [N, O] of the rows with the stack `name`, plus the correction of its adapter, if any."""
        rows_NI, stack = in_autocast_dtype(rows_NI, getattr(self, name))
        return corrected(name, rows_NI, stack.mT if self.is_transposed else stack, division, corrections)

    def forward(
        self,
        hidden_TD: Tensor,
        experts_Tk: Tensor,
        weights_Tk: Tensor,
        *,
        complete: bool = False,
        **corrections: Correction,
    ) -> Tensor:
        """Like `mix_experts`; `corrections` as in `expert_outputs`."""
        (hidden_TD,) = in_autocast_dtype(hidden_TD)
        compute = partial(self.outputs, corrections=corrections)
        return mix_outputs(hidden_TD, experts_Tk, weights_Tk, self.num_experts, compute, complete=complete)
