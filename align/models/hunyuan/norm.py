"""RMSNorm with an explicit backward pass.

Normalisation is bound by memory bandwidth: autograd's chain of small operations reads and writes about twice as much
as the closed form.

Shapes: the mean is over the last dimension, D; r = 1 / sqrt(mean(x^2) + eps).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x * r * weight, computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            normed: Tensor = _RmsNorm.apply(x, self.weight, self.eps)
            return normed
        return self.weight * unit_rms(x, self.eps)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x * r over the last dimension, computed in fp32."""
    normed: Tensor = _UnitRms.apply(x.float(), eps)
    return normed.to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _UnitRms(torch.autograd.Function):
    """y = r x; dx = r (dy - y mean(dy . y))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        r = _inverse_rms(x, eps)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        mean = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, mean, value=-1).mul_(r), None


class _RmsNorm(torch.autograd.Function):
    """y = r x w; dw = sum over rows of r x dy; dx = r w dy - r^3 x mean(w dy . x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        product = (grad * x).reshape(-1, x.shape[-1])  # both sums below are matrix-vector products with `product`
        d_weight = r.reshape(-1) @ product
        along_x = (product @ weight).view_as(r).mul_(r**3).div_(x.shape[-1])
        return (grad * weight).mul_(r).addcmul_(x, along_x, value=-1), d_weight, None
