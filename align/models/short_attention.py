"""Causal attention for short sequences on a CPU, as batched matrix products with an explicit backward pass.

On short sequences torch's kernel gains little from a second thread, and this code is faster. From about 200 tokens on,
torch's kernel is as fast, because it skips masked blocks and never stores the T x T weights.

Shapes: B sequences, T tokens, H query heads, K key/value heads, d head size; G = H / K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from align.models.experts import in_autocast_dtype

LONGEST = 128
"""Maximum sequence length in tokens for which this code is used."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float) -> Tensor:
    """Causal attention: query [B, H, T, d], key and value [B, K, T, d] -> [B, H, T, d]."""
    query, key, value = in_autocast_dtype(query, key, value)
    short = query.shape[2] <= LONGEST and not dropout and query.dtype == torch.float32
    if short and query.device.type == "cpu":
        output: Tensor = _ShortAttention.apply(query, key, value, scaling)
        return output
    group = query.shape[1] // key.shape[1]
    if group > 1 and repeats_heads(query):
        key, value, group = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1), 1
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=group > 1
    )


def repeats_heads(query: Tensor) -> bool:
    """True if grouped key/value heads must be repeated for torch's attention.

    On a GPU, torch's flash kernel does not support float32, and its memory-efficient kernel does not support grouped
    heads. The only kernel that supports both stores the T x T weights.
    """
    return query.dtype == torch.float32 and query.device.type != "cpu"


class _ShortAttention(torch.autograd.Function):
    """P = softmax(scaling Q K^T, masked), output P V. The G query heads that share a key head are stacked as
    rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        tokens = query.shape[2]
        q, k, v = (x.reshape(-1, x.shape[1] // key.shape[1] * tokens, x.shape[3]) for x in (query, key, value))
        later = torch.full((tokens, tokens), -torch.inf, dtype=q.dtype).triu_(1)
        scores = torch.baddbmm(later.repeat(q.shape[1] // tokens, 1), q, k.mT, alpha=scaling)
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling = scaling
        return torch.bmm(weights, v).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        batch, heads, tokens, size = grad.shape
        grad = grad.reshape(q.shape)
        d_v = torch.bmm(weights.mT, grad)
        d_scores = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype)
        d_scores.mul_(ctx.scaling)
        d_q, d_k = torch.bmm(d_scores, k), torch.bmm(d_scores.mT, q)
        kv_shape = (batch, -1, tokens, size)
        return d_q.view(batch, heads, tokens, size), d_k.view(kv_shape), d_v.view(kv_shape), None
