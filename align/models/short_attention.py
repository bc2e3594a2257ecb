"""Causal attention, optionally with a sliding window, a soft cap or sinks.

Most cases use torch's kernel. Short sequences on a CPU use batched matrix products with an explicit backward pass. On
short sequences torch's kernel gains little from a second thread, and our code is faster. From about 200 tokens on,
torch's kernel is as fast, because it skips masked blocks and never stores the T x T weights.

Shapes: B sequences, T tokens, S keys, H query heads, K key/value heads, d head size (values may have another);
G = H / K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from align.models.experts import in_autocast_dtype

LONGEST = 128
"""Maximum sequence length in tokens for which this code is used."""


class Variant(NamedTuple):
    """Variant of causal attention that an architecture uses.

    window: number of last tokens, the query's own included, that a query sees; None for all.
    softcap: scores become softcap * tanh(scores / softcap).
    sinks_H: score of an additional key without a value per query head, which takes part in the softmax only.
    """

    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None


PLAIN = Variant()


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float, variant: Variant = PLAIN
) -> Tensor:
    """Causal attention: query [B, H, T, d], key and value [B, K, T, d] -> [B, H, T, d of the values]."""
    query, key, value = in_autocast_dtype(query, key, value)
    tokens = query.shape[2]
    seen = None
    if variant.window is not None and variant.window < tokens:
        seen = _order(query).triu_(1 - variant.window)[None, None]
    if variant.softcap is not None or variant.sinks_H is not None:
        seen = _order(query)[None, None] if seen is None else seen
        return general_attention(query, key, value, seen, scaling=scaling, dropout=dropout, variant=variant)
    short = tokens <= LONGEST and not dropout and query.dtype == torch.float32 and seen is None
    if short and query.device.type == "cpu" and query.shape[3] == value.shape[3]:
        output: Tensor = _ShortAttention.apply(query, key, value, scaling)
        return output
    group = query.shape[1] // key.shape[1]
    if group > 1 and repeats_heads(query):
        key, value, group = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1), 1
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        is_causal=seen is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=group > 1,
    )


def _order(query: Tensor) -> Tensor:
    """Causal order [T, T]: True where a query sees a key."""
    tokens = query.shape[2]
    return torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril_()


def general_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    variant: Variant,
) -> Tensor:
    """Attention in plain torch operations, with soft cap and sinks; stores the T x S weights.

    mask: [B or 1, 1, T, S]; True, or 0.0 in an additive mask, where a query sees a key. None: all keys are seen. It
        includes the causal order and the window.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.mT * scaling
    if variant.softcap is not None:
        scores = variant.softcap * (scores / variant.softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if variant.sinks_H is not None:
        sinks = variant.sinks_H.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if variant.sinks_H is not None:
        weights = weights[..., :-1]
    return torch.nn.functional.dropout(weights, dropout, training=dropout > 0) @ value


def repeats_heads(query: Tensor) -> bool:
    """True if grouped key/value heads must be repeated for torch's attention.

    On a GPU, torch's flash kernel does not support float32, and its memory-efficient kernel does not support grouped
    heads. The only kernel that supports both stores the T x T weights.
    """
    return query.dtype == torch.float32 and query.device.type != "cpu"


class _ShortAttention(torch.autograd.Function):
    """P = softmax(scaling Q K^T, masked), output P V.

    The G query heads that share a key head are stacked as rows of one product.
    """

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
