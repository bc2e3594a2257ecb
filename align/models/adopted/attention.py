"""Attention of the adopted families, registered with transformers under the name "align": packed rows, sliding windows,
soft caps and sinks.

Shapes: B sequences, N tokens of a packed row, T tokens, S keys, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from align.models.packing import Packing
from align.models.short_attention import Variant, general_attention

NAME = "align"


class CountedPacking:
    """Packing of one forward pass; counts the attention layers that used it.

    A model that does not pass its keyword arguments on to attention would silently let sequences see each other.
    """

    def __init__(self, packing: Packing):
        self.packing = packing
        self.used = 0


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: CountedPacking | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers' attention functions; the result is [B, T, H, d].

    With `packing` the mask is ignored. Otherwise torch's kernel is used, or, with a soft cap or sinks, plain torch
    operations; transformers' own path through that kernel would drop the cap silently.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    variant = Variant(_window(module, sliding_window), softcap, s_aux)
    if packing is not None:
        packing.used += 1
        attended = packing.packing.attend(query, key, value, scaling=scaling, dropout=dropout, variant=variant)
        return attended.contiguous(), None  # afmoe takes a view; a single sequence would be strided
    if softcap is None and s_aux is None:
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    if attention_mask is None and query.shape[2] > 1:
        tokens, keys = query.shape[2], key.shape[2]
        attention_mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril_(keys - tokens)
    output = general_attention(
        query, key, value, attention_mask, scaling=scaling, dropout=dropout, variant=variant
    ).transpose(1, 2)
    return output.contiguous(), None


def _window(module: nn.Module, passed: int | None) -> int | None:
    """The layer's window. Some families pass it on, others only use it for the mask and keep it in the layer."""
    if passed is None and getattr(module, "is_sliding", False):
        kept: int | None = getattr(module, "sliding_window", None)
        return kept
    return passed


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
