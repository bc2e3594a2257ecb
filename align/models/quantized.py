"""Frozen weights in 4 bits, dequantised in each product (QLoRA, arXiv 2305.14314).

A weight is divided into blocks of 64 consecutive values. A value is stored as one of 16 levels, relative to the largest
magnitude of its block. The levels (NF4) are quantiles of the normal distribution. Codes and magnitudes equal those of
bitsandbytes without double quantisation.

bitsandbytes dequantises if it is installed, as it must be on a GPU. On a CPU torch can do the same, in more time. The
4-bit layers of bitsandbytes are not used: they have no stacks of experts, and on a CPU they pack their weights again in
the first forward pass in evaluation mode, after which the gradient of their inputs is lost.

Shapes: E experts, I inputs, O outputs, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import UserError
from align.models.experts import Correction, ExpertRows, Experts, grouped_product, in_autocast_dtype
from align.models.family import family_of
from align.models.mixing import mixed

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The levels of NF4 in ascending order; the code of a value is its index here."""
BLOCK = 64
"""Values that share a scale."""
BYTES_PER_VALUE = 0.5 + 4 / BLOCK
CHUNK = 2**22
"""Values that are quantised at a time."""


@lru_cache
def _level_pairs(device: torch.device) -> Tensor:
    """The two float32 levels of each of the 256 bytes, as one float64, so that one gather reads both."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)
    return pairs.contiguous().view(torch.float64).view(-1).to(device)


@lru_cache
def _bounds(device: torch.device) -> Tensor:
    """Midpoints between neighbouring levels."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    return ((levels[:-1] + levels[1:]) / 2).to(device)


@dataclass(frozen=True)
class Nf4:
    """A matrix [O, I] or a stack of matrices in 4 bits.

    codes: two values per byte, the first one in the upper half; uint8 [values / 2].
    scales: largest magnitude of each block; float32 [values / 64].
    shape: shape of the weight.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, weight: Tensor) -> Nf4:
        """Quantise a weight whose matrices consist of whole blocks."""
        flat, codes, scales = weight.detach().reshape(-1), list[Tensor](), list[Tensor]()
        bounds = _bounds(weight.device)
        for part in flat.split(CHUNK):
            blocks = part.float().view(-1, BLOCK)
            largest = blocks.abs().amax(1)
            relative = blocks * (1.0 / largest.clamp(min=1e-38))[:, None]
            code = torch.bucketize(relative.clamp_(-1, 1).view(-1), bounds, out_int32=True).to(torch.uint8)
            codes.append((code[::2] << 4) | code[1::2])
            scales.append(largest)
        return cls(torch.cat(codes), torch.cat(scales), weight.shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight."""
        if has_library():
            # Pass rows of one block each: the CPU operator is wrong for rows that are not whole blocks.
            return torch.ops.bitsandbytes.dequantize_4bit.default(  # type: ignore[no-any-return]
                self.codes[:, None], self.scales, BLOCK, "nf4", (len(self.scales), BLOCK), dtype
            ).view(self.shape)
        # `index_select` of 8-byte values takes an eighth of the time of indexing.
        values = _level_pairs(self.codes.device).index_select(0, self.codes.int()).view(torch.float32)
        return values.view(-1, BLOCK).mul_(self.scales[:, None]).view(self.shape).to(dtype)

    def __getitem__(self, number: int) -> Nf4:
        """One matrix of a stack."""
        size = math.prod(self.shape[1:])
        part = slice(number * size // 2, (number + 1) * size // 2)
        blocks = slice(number * size // BLOCK, (number + 1) * size // BLOCK)
        return Nf4(self.codes[part], self.scales[blocks], self.shape[1:])

    def to(self, device: torch.device) -> Nf4:
        """The same values on another device; itself if it is there already."""
        if device == self.codes.device:
            return self
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def equals(self, other: Nf4) -> bool:
        return torch.equal(self.codes, other.codes.to(self.codes.device)) and torch.equal(
            self.scales, other.scales.to(self.scales.device)
        )

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def is_quantizable(shape: tuple[int, ...]) -> bool:
    """True if each matrix of a weight consists of whole blocks."""
    return math.prod(shape[-2:]) % BLOCK == 0


class Product(torch.autograd.Function):
    """x W^T. W is dequantised in both passes and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Nf4) -> Tensor:
        ctx.weight_OI = weight_OI
        return nn.functional.linear(x, weight_OI.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight_OI.dense(grad.dtype), None


class StackProduct(torch.autograd.Function):
    """x W_e^T for rows sorted by expert, as `sorted_product`.

    The weights are dequantised in both passes and kept in neither: one expert at a time, or on a GPU in bf16 one stack.

    is_transposed: the stack is [E, I, O].
    """

    @staticmethod
    def forward(ctx: Any, rows_NI: Tensor, stack: Nf4, is_transposed: bool, division: ExpertRows) -> Tensor:
        ctx.stack, ctx.is_transposed, ctx.division = stack, is_transposed, division
        return _stack_product(rows_NI, stack, is_transposed, division)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None, None, None]:
        return _stack_product(grad_NO, ctx.stack, not ctx.is_transposed, ctx.division), None, None, None


def _stack_product(rows_NI: Tensor, stack: Nf4, is_transposed: bool, division: ExpertRows) -> Tensor:
    experts, *sides = stack.shape
    if rows_NI.is_cuda and rows_NI.dtype == torch.bfloat16 and all(side % 8 == 0 for side in sides):
        dense = stack.dense(rows_NI.dtype)
        return grouped_product(rows_NI, dense.mT if is_transposed else dense, division)
    result = rows_NI.new_empty(len(rows_NI), sides[1] if is_transposed else sides[0])
    *parts, rest = result.split(division.counts)
    for expert, rows, part in zip(range(experts), rows_NI.split(division.counts), parts):
        if len(rows):
            matrix = stack[expert].dense(rows.dtype)
            torch.mm(rows, matrix if is_transposed else matrix.mT, out=part)
    rest.zero_()
    return result


class Quantized(nn.Module):
    """A module with weights in 4 bits.

    For each of them the module keeps a placeholder parameter of the same name and shape, which takes the memory of one
    value. Adapters read their sizes from the placeholder. Its values are NaN, so that an accidental product with it is
    noticed.
    """

    quantized: dict[str, Nf4]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the module. 4-bit weights have no other dtype."""
        stand_ins = {name: self._parameters[name] for name in self.quantized}
        self._parameters.update(dict.fromkeys(stand_ins))
        super()._apply(fn, recurse)
        for name, parameter in stand_ins.items():
            assert parameter is not None
            element = fn(parameter.detach()[(0,) * parameter.dim()])
            parameter.data = element.expand(parameter.shape)
            self._parameters[name] = parameter
            self.quantized[name] = self.quantized[name].to(element.device)
        return self

    def dense(self, name: str) -> Tensor:
        """A dequantised weight in the dtype of the model."""
        return self.quantized[name].dense(getattr(self, name).dtype)


class QuantizedLinear(Quantized, nn.Linear):
    """Linear layer with a frozen weight in 4 bits."""

    def forward(self, x: Tensor) -> Tensor:
        (x,) = in_autocast_dtype(x)
        product: Tensor = Product.apply(x, self.quantized["weight"])
        return product if self.bias is None else product + self.bias.to(product.dtype)


class QuantizedExperts(Quantized, Experts):
    """Mix-in before a class of routed experts: the stacks are in 4 bits."""

    def product(
        self, name: str, rows_NI: Tensor, division: ExpertRows, corrections: Mapping[str, Correction]
    ) -> Tensor:
        (rows_NI,) = in_autocast_dtype(rows_NI)
        product: Tensor = StackProduct.apply(rows_NI, self.quantized[name], self.is_transposed, division)
        return product + corrections[name](rows_NI, division) if name in corrections else product


def quantizable(model: Any, kept: Callable[[str], bool]) -> dict[str, nn.Module]:
    """{name of a parameter: its module} of all weights of a plain model that can be stored in 4 bits.

    They are those of attention, MLPs and routed experts. Embeddings, head, routers, norms and biases keep their
    precision, and so does a linear layer that does not consist of whole blocks.

    kept: True for the names of parameters that are trained in full.

    Raises `UserError` if routed experts cannot be quantised.
    """
    targets = family_of(model.config).lora(model.config)
    endings = tuple(f".{name}" for name in (*targets.attention, *targets.mlp))
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            stacks = {key: values for key, values in module.named_parameters(recurse=False) if values.dim() == 3}
            for key, values in stacks.items():
                if not is_quantizable(tuple(values.shape)):
                    raise UserError(
                        f"lora.quantize: the experts of '{name}' have matrices of {list(values.shape[1:])}, whose size "
                        f"is not a multiple of {BLOCK}; remove quantize."
                    )
                found[f"{name}.{key}"] = module
        elif type(module) is nn.Linear and name.endswith(endings) and is_quantizable(tuple(module.weight.shape)):
            found[f"{name}.weight"] = module
    return {name: module for name, module in found.items() if not kept(name)}


def quantize(module: nn.Module, name: str, weight: Nf4, dtype: torch.dtype) -> None:
    """Replace the parameter `name` of a module by a weight in 4 bits. dtype: dtype of the model."""
    if not isinstance(module, Quantized):
        kind: type[Quantized] = QuantizedLinear if isinstance(module, nn.Linear) else QuantizedExperts
        module.__class__ = mixed(kind, type(module)) if kind is QuantizedExperts else kind
        assert isinstance(module, Quantized)
        module.quantized = {}
    nan = torch.full((), math.nan, dtype=dtype, device=weight.codes.device)
    module.quantized[name] = weight
    module._parameters[name] = nn.Parameter(nan.expand(weight.shape), requires_grad=False)


def quantize_model(model: Any, kept: Callable[[str], bool] = lambda _name: False) -> None:
    """Quantise the weights of a plain model in memory. kept: as in `quantizable`."""
    for name, module in quantizable(model, kept).items():
        weight = module.get_parameter(leaf := name.rpartition(".")[2])
        quantize(module, leaf, Nf4.of(weight), weight.dtype)


def quantized_weights(model: nn.Module) -> dict[int, Nf4]:
    """The 4-bit weights of a model, plain or wrapped by PEFT, by the id of the parameter that stands for each."""
    return {
        id(module._parameters[name]): weight
        for module in model.modules()
        if isinstance(module, Quantized)
        for name, weight in module.quantized.items()
    }


@lru_cache
def has_library() -> bool:
    """True if bitsandbytes is installed. Loads its operators."""
    if find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401

    return True


def require_library() -> None:
    """Raise `UserError` if this machine has a GPU but not bitsandbytes."""
    if torch.cuda.is_available() and not has_library():
        raise UserError(
            "lora.quantize: on a GPU it needs bitsandbytes, which is not installed; run pip install 'align-moe[qlora]'."
        )
