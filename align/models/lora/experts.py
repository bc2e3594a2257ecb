"""LoRA on stacked experts, applied to the rows of each expert instead of to its weights.

PEFT adds B_e A_e to the whole stack before every forward pass, which needs a copy and a gradient as large as the stack.
Here W_e x + s B_e (A_e x) is computed for the rows x of expert e. In one process the factors remain those of PEFT
(`RowAdapter`). Under DeepSpeed the experts may be rank-local and the factors sharded by ZeRO-3, because each factor's
weight is read only in the forward pass of its own module (`ExpertAdapter`).

Shapes: N rows sorted by expert, E experts on this rank, I inputs, O outputs, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from align.models.experts import ExpertRows, Experts, in_autocast_dtype, sorted_product


class Factor(nn.Module):
    """One LoRA factor, A or B, of all experts on this rank: [E, O, I]."""

    def __init__(self, weight_EOI: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight_EOI)

    def forward(self, rows_NI: Tensor, division: ExpertRows) -> Tensor:
        rows_NI, weight_EOI = in_autocast_dtype(rows_NI.to(self.weight.dtype), self.weight)
        return sorted_product(rows_NI, weight_EOI, division)


class _ByRow(ParamWrapper):
    """Adapter on one stack of an `Experts` module. The module adds `correction` to the stack's product."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif not self.merged and any(name in self.lora_A for name in self.active_adapters):
            kwargs[self.parameter_name] = self.correction
        outputs: Tensor = self.base_layer(*args, **kwargs)
        return outputs

    def correction(self, rows_NI: Tensor, division: ExpertRows) -> Tensor:
        """Sum over the active adapters of s B_e A_e x for each row, [N, O]."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        outputs = [self.product(name, rows_NI, division) * self.scaling[name] for name in active]
        total: Tensor = sum(outputs[1:], outputs[0])
        return total.to(rows_NI.dtype)

    def product(self, name: str, rows_NI: Tensor, division: ExpertRows) -> Tensor:
        """B_e A_e x of one adapter, [N, O]."""
        raise NotImplementedError


class RowAdapter(_ByRow):
    """PEFT's adapter with PEFT's factors, A [E r, I] and B [O, r E], applied by row.

    PEFT adds, loads, saves, merges and switches it as its own.
    """

    def product(self, name: str, rows_NI: Tensor, division: ExpertRows) -> Tensor:
        a_EI: Any = self.lora_A[name].weight
        b_OE: Any = self.lora_B[name].weight
        rows_NI, a_EI, b_OE = in_autocast_dtype(rows_NI.to(a_EI.dtype), a_EI, b_OE)
        a_ErI = a_EI.unflatten(0, (self.num_experts, -1))
        # Grouped products refuse the strides of the permuted view.
        b_EOr = b_OE.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1).contiguous()
        return sorted_product(sorted_product(rows_NI, a_ErI, division), b_EOr, division)


RowAdapter.__name__ = ParamWrapper.__name__  # PEFT finds the wrapper of a second adapter by this name


class ExpertAdapter(_ByRow):
    """Adapter with the factors of this rank's experts, A [E, r, I] and B [E, O, r].

    It replaces an adapter that PEFT created for all experts of the layer, and keeps PEFT's names and switches.
    `peft_shape` converts factors to the shapes that PEFT saves.
    """

    def __init__(self, made: ParamWrapper):
        nn.Module.__init__(self)
        self.__dict__.update(made.__dict__)
        experts: Any = self.get_base_layer()
        for name in list(self.lora_A):
            linear: Any = self.lora_A[name], self.lora_B[name]
            a_EI, b_OE = (factor.weight.detach() for factor in linear)
            a_EI, b_EO = a_EI.unflatten(0, (self.num_experts, -1)), b_OE.unflatten(1, (-1, self.num_experts))
            self.lora_A[name] = Factor(a_EI[experts.local_experts].clone())
            # Grouped products refuse the strides that a plain clone would keep.
            self.lora_B[name] = Factor(b_EO.permute(2, 0, 1)[experts.local_experts].contiguous().clone())

    def factors(self) -> Iterator[nn.Parameter]:
        yield from self.lora_A.parameters()
        yield from self.lora_B.parameters()

    def product(self, name: str, rows_NI: Tensor, division: ExpertRows) -> Tensor:
        outputs: Tensor = self.lora_B[name](self.lora_A[name](rows_NI, division), division)
        return outputs


def apply_by_row(model: nn.Module) -> None:
    """Let every PEFT adapter on a stack of `Experts` compute by row; its parameters are unchanged."""
    for module in model.modules():
        if type(module) is ParamWrapper and isinstance(module.get_base_layer(), Experts):
            module.__class__ = RowAdapter


def adapt_by_row(model: nn.Module) -> None:
    """Replace every PEFT adapter on a stack by an `ExpertAdapter`, which holds the factors of this rank's experts."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, ParamWrapper) and not isinstance(child, ExpertAdapter):
                setattr(parent, key, ExpertAdapter(child))


def delta(adapter: Any, name: str, a: Tensor, b: Tensor) -> Tensor:
    """Sum that the adapter `name` adds to the full weight, computed from its full factors `a` and `b`."""
    if isinstance(adapter, ExpertAdapter):
        product = torch.bmm(b, a)
        if adapter.get_base_layer().is_transposed:
            product = product.mT
    else:
        product = b @ a
    scaled: Tensor = product * adapter.scaling[name]
    return scaled


def peft_shape(name: str, factor: Tensor) -> Tensor:
    """A full factor in the shape that PEFT saves: A [E * r, I], ordered by expert, or B [O, r * E], ordered by LoRA
    rank. Other parameters are returned unchanged."""
    if factor.dim() != 3:
        return factor
    if ".lora_A." in name:
        return factor.flatten(0, 1)
    return factor.permute(1, 2, 0).flatten(1).contiguous()
