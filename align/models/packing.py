"""Packing: sequences of different lengths concatenated into one row, which needs no padding outside attention.

Only attention depends on the sequence boundaries; all other layers compute each token on its own.

Shapes: S sequences, N tokens of all sequences, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.data.transfer import indices_to_device
from align.models.experts import Gather
from align.models.short_attention import PLAIN, Variant, causal_attention

CPU = torch.device("cpu")
SHORTEST = 0.75
"""Attention pads the sequences of a group to the longest one. A sequence that is shorter than this fraction of the
longest starts a new group."""


class Padded(NamedTuple):
    """Sequences as a batch with padding.

    slots_SL: index of the token at each position; padding repeats the sequence's last token.
    places_N: position of each token in the flattened batch.
    mask_SL: 1 for tokens, 0 for padding.
    """

    slots_SL: Tensor
    places_N: Tensor
    mask_SL: Tensor


class Packing:
    """Boundaries of S sequences in a row of N tokens.

    lengths: tokens of each sequence, in the order of the row. Raises `ValueError` for a sequence without tokens.
    device: device of the row. All indices are computed on the CPU and copied to it in one transfer.

    total: N.
    lengths: as passed.
    starts_S: index of each sequence's first token, on the CPU.
    last_S: index of each sequence's last token.
    position_ids: position of each token in its sequence [1, N].
    """

    def __init__(self, lengths: Sequence[int], device: torch.device = CPU):
        if not lengths or min(lengths) < 1:
            raise ValueError("a sequence without tokens cannot be packed")
        self.total = sum(lengths)
        self.lengths = list(lengths)
        self._padded: Padded | None = None
        lengths_S = torch.tensor(lengths)
        self.starts_S = lengths_S.cumsum(0) - lengths_S
        last_S = self.starts_S + lengths_S - 1
        tokens = torch.arange(self.total)
        positions = tokens - self.starts_S.repeat_interleave(lengths_S, output_size=self.total)
        self._equal = len(set(lengths)) == 1  # the row is then a batch without padding
        groups = _of_similar_length(lengths)
        self._shapes = [(len(group), lengths[group[0]]) for group in groups]
        # slots: index of the token at each position of the padded groups, one group after another; padding repeats the
        # sequence's last token. places: position of each token in the padded groups.
        slots, places, first = [], torch.empty_like(tokens), 0
        for group, (count, width) in zip(groups, self._shapes, strict=True):
            rows = torch.tensor(group)[:, None]
            token = torch.minimum(self.starts_S[rows] + tokens[:width], last_S[rows])
            real = tokens[:width] < lengths_S[rows]
            places[token[real]] = first + real.flatten().nonzero()[:, 0]
            slots.append(token.flatten())
            first += count * width
        positions, self.last_S, self._slots, self._places = indices_to_device(
            (positions, last_S, torch.cat(slots), places), device
        )
        self.position_ids = positions[None]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        dropout: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        """Causal attention inside each sequence: query [1, H, N, d], key and value [1, K, N, d] -> [1, N, H, d].

        The head size of the values may differ; it is then that of the result.
        """
        outputs = []
        for q, k, v in zip(*(self._groups(x) for x in (query, key, value)), strict=True):
            # Padding comes after the real tokens, so the causal mask hides it.
            attended = causal_attention(q, k, v, scaling=scaling, dropout=dropout, variant=variant)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        if self._equal:
            return outputs[0][None]
        unpadded: Tensor = _Unpad.apply(torch.cat(outputs), self._places)
        return unpadded[None]

    def padded(self) -> Padded:
        """Indices of the same sequences as a batch padded on the right, for layers that mix neighbouring tokens."""
        if self._padded is None:
            lengths_S = torch.tensor(self.lengths)
            place = torch.arange(int(lengths_S.max()))
            token = torch.minimum(self.starts_S[:, None] + place, (self.starts_S + lengths_S - 1)[:, None])
            real = place < lengths_S[:, None]
            indices = (token.flatten(), real.flatten().nonzero()[:, 0], real.long().flatten())
            slots, places, mask = indices_to_device(indices, self.last_S.device)
            shape = tuple(token.shape)
            self._padded = Padded(slots.view(shape), places, mask.view(shape))
        return self._padded

    def _groups(self, x: Tensor) -> Iterator[Tensor]:
        """Split into padded groups: [1, heads, N, d] -> [sequences, heads, width, d] of each group."""
        rows = x[0].transpose(0, 1)
        if not self._equal:
            # `Gather` passes back no gradient from padding. That gradient is zero, because outputs at padding are
            # dropped.
            rows = Gather.apply(rows, self._slots, self._places, 1)
        sizes = [count * width for count, width in self._shapes]
        for part, shape in zip(rows.split(sizes), self._shapes, strict=True):
            yield part.unflatten(0, shape).transpose(1, 2)


class _Unpad(torch.autograd.Function):
    """Select the tokens from the padded groups. The gradient at padding is zero."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, places, grad), None


def _of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences in groups of similar length, longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[i] < SHORTEST * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return groups
