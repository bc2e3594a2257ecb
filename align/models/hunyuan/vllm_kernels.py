"""vLLM's kernels for norms, rotation and routed experts: one call instead of five to fifteen torch operations.

With few running sequences the number of calls determines the time of a decoding step. Every kernel reads its weights at
each call. The experts' weights are stored in the kernel's order, so that an update needs no repacking.

Shapes: T tokens, D hidden, H heads, d head size, E experts, k experts per token, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm import _custom_ops as kernels
from vllm.platforms import current_platform

from align.models.hunyuan.configuration import HunYuanConfig
from align.models.hunyuan.rope import inverse_frequencies

BLOCK = 16
"""Rows per block in the weight layout of `cpu_fused_moe`."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to `residual` in place; returns the normalised sum, which overwrites x."""
        kernels.fused_add_rms_norm(x, residual, self.weight, self.eps)
        return x


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()  # with other strides the kernel silently returns wrong values
    normed = torch.empty_like(x)
    kernels.rms_norm(normed, x, weight, eps)
    return normed


class Rotation(nn.Module):
    """Rotate queries and keys in place by the angles of their positions."""

    table: Tensor

    def __init__(self, config: HunYuanConfig, positions: int, dtype: torch.dtype):
        super().__init__()
        self.head_dim = config.head_dim
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(config).cpu()
        table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        self.register_buffer("table", table.to(torch.get_default_device()), persistent=False)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor | None) -> None:
        """positions [T]; query and key [T, H * d], possibly slices of longer rows."""
        kernels.rotary_embedding(positions, query, key, self.head_dim, self.table, True)


def has_fused_experts(config: HunYuanConfig, width: int) -> bool:
    """True if vLLM computes on a CPU and its fused kernel supports these experts: aligned sizes, SiLU."""
    aligned = config.hidden_size % 32 == 0 and width % 32 == 0
    return current_platform.is_cpu() and aligned and config.hidden_act == "silu"


def fused_experts(hidden_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Like `mix_experts`, with weights in the order that `in_rows` reads."""
    output = torch.empty_like(hidden_TD)
    kernels.cpu_fused_moe(
        output, hidden_TD.contiguous(), w13, w2, None, None, weights_Tk, experts_Tk.int(), "silu", "vec"
    )
    return output


def in_rows(matrices: Tensor) -> Tensor:
    """View, as [..., N/16, 16, K], of matrices [..., N, K] that are stored in the kernel's order: transposed blocks of
    16 rows."""
    *experts, rows, columns = matrices.shape
    return matrices.view(*experts, rows // BLOCK, columns, BLOCK).transpose(-2, -1)
