"""Rotary position embedding as the published weights were trained with it.

Shapes: B sequences, T tokens, H heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.models.hunyuan.configuration import HunYuanConfig


def inverse_frequencies(config: HunYuanConfig) -> Tensor:
    """base' ** (-2i/d), i = 0..d/2-1, as float32 [d/2], rounded to `rope_inv_freq_dtype`.

    The reference rounds them to bfloat16 when the base is plain and keeps float32 when an alpha changes it. Measured on
    its outputs: the wrong choice moves logits of a four-layer model by 1e-2, the right one agrees to 2e-5.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_base() ** exponent
    has_alpha = bool((config.rope_scaling or {}).get("alpha"))
    dtype = config.rope_inv_freq_dtype or ("float32" if has_alpha else "bfloat16")
    return frequencies.to(getattr(torch, dtype)).float()


def rotation_tables(frequencies: Tensor, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, d] of position_ids [B, T]."""
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of x [B, H, T, d] by their positions' angles."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
