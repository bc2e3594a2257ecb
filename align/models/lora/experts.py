"""LoRA on stacked experts as products with the rows that an expert has, instead of with its weights.

PEFT adds B_e A_e to the whole stack before every pass, which needs memory and a gradient as large as the stack. Here
W_e x + s B_e (A_e x) is computed for the rows x of expert e. What it holds may be some of a layer's experts only, and
a rank's part of those: nothing but a factor's own pass looks at its weight.

Shapes: N rows sorted by expert, E experts, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from align.models.experts import in_autocast_dtype, sorted_product


class Factor(nn.Module):
    """One factor of the held experts' adapters, [E, O, I]."""

    def __init__(self, weight_EOI: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight_EOI)

    def forward(self, rows_NI: Tensor, counts_E: Tensor) -> Tensor:
        rows_NI, weight_EOI = in_autocast_dtype(rows_NI, self.weight)
        return sorted_product(rows_NI, weight_EOI, counts_E)


class ExpertAdapter(ParamWrapper):
    """PEFT's adapter on one of the stacks of an `Experts`, which it hands what is to be added to the stack's product.

    It takes the place of an adapter that PEFT has made for all experts of the layer, with PEFT's names and switches,
    and keeps the held ones' part of the values. `peft_shape` gives the factors the shapes in which PEFT writes them.
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
            self.lora_B[name] = Factor(b_EO.permute(2, 0, 1)[experts.local_experts].clone())

    def factors(self) -> Iterator[nn.Parameter]:
        yield from self.lora_A.parameters()
        yield from self.lora_B.parameters()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.disable_adapters:
            kwargs[self.parameter_name] = self.correction
        outputs: Tensor = self.base_layer(*args, **kwargs)
        return outputs

    def correction(self, rows_NI: Tensor, counts_E: Tensor) -> Tensor:
        """s B_e A_e x of the rows, [N, O]."""
        (name,) = self.active_adapters
        outputs: Tensor = self.lora_B[name](self.lora_A[name](rows_NI, counts_E), counts_E) * self.scaling[name]
        return outputs


def adapt_by_row(model: nn.Module) -> None:
    """Put an `ExpertAdapter` in the place of every adapter that PEFT has on a stack."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is ParamWrapper:
                setattr(parent, key, ExpertAdapter(child))


def delta(adapter: Any, name: str, a: Tensor, b: Tensor) -> Tensor:
    """What an adapter adds to its whole weight, given its whole factors in float32."""
    if isinstance(adapter, ExpertAdapter):
        product = torch.bmm(b, a)
    else:
        product = b @ a
    scaled: Tensor = product * adapter.scaling[name]
    return scaled


def peft_shape(name: str, factor: Tensor) -> Tensor:
    """A whole parameter as PEFT writes it: stacks of factors are matrices there, A by expert and B by rank first."""
    if factor.dim() != 3:
        return factor
    if ".lora_A." in name:
        return factor.flatten(0, 1)
    return factor.permute(1, 2, 0).flatten(1).contiguous()
