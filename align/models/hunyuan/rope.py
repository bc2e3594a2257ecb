"""Rotary position embedding, rounded as in the code that the published weights were trained with.

Shapes: B sequences, T tokens, H heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.models.hunyuan.configuration import HunYuanConfig


def inverse_frequencies(config: HunYuanConfig) -> Tensor:
    """base ** (-2i/d), i = 0..d/2-1, as float32 [d/2], rounded to `rope_inv_freq_dtype`; base is `config.rope_base()`.

    Without an alpha the released code rounds the frequencies to bfloat16; with an alpha it keeps float32. The wrong
    choice changes the logits of a four-layer model by 1e-2. With the right choice they agree with the
    released code's to 2e-5.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_base() ** exponent
    has_alpha = bool((config.rope_scaling or {}).get("alpha"))
    dtype = config.rope_inv_freq_dtype or ("float32" if has_alpha else "bfloat16")
    return frequencies.to(getattr(torch, dtype)).float()


def rotation_tables(frequencies: Tensor, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, d] of position_ids [B, T]; the first half of sin is negated, as `rotate` needs it."""
    angles = position_ids[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of x [B, H, T, d] by their positions' angles."""
    rotated: Tensor = _Rotation.apply(x, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    """The backward pass is the inverse rotation: the same arithmetic with sin negated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).addcmul_(grad.roll(grad.shape[-1] // 2, dims=-1), sin, value=-1), None, None
