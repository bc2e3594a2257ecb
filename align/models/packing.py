"""Packing: sequences of different lengths concatenated into one row, which needs no padding outside attention.

Only attention depends on the sequence boundaries; all other layers compute each token on its own. Two sequences with
the same first tokens, such as a prompt with two completions, need these tokens only once in the row: a token's hidden
state depends on the tokens before it, not on those after it.

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

    lengths: tokens of each sequence, in the order of the row.
    device: device of the row. All indices are computed on the CPU and copied to it in one transfer.
    shared: number of first tokens that each sequence has in common with the sequence before it and that are therefore
        not repeated in the row; 0 by default. The sequence before it must itself share none.
        Raises `ValueError` for other values, and for a sequence without a token of its own.

    total: N.
    lengths: as passed.
    starts_S: index of each sequence's first token of its own, on the CPU.
    last_S: index of each sequence's last token.
    position_ids: position of each token in its sequence [1, N].
    counts_N: number of sequences that each token belongs to; None if each belongs to one.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device = CPU, shared: Sequence[int] | None = None):
        shared = [0] * len(lengths) if shared is None else shared
        own = [length - common for length, common in zip(lengths, shared, strict=True)]
        if not own or min(own) < 1:
            raise ValueError("a sequence without tokens cannot be packed")
        before = zip(shared, [0, *lengths], [1, *shared], strict=False)
        if any(common < 0 or (common and (common > length or chained)) for common, length, chained in before):
            raise ValueError("a sequence can only share tokens with the one before it, if that shares none")
        self.total = sum(own)
        self.lengths = list(lengths)
        self._padded: Padded | None = None
        own_S, lengths_S = torch.tensor(own), torch.tensor(lengths)
        self.starts_S = own_S.cumsum(0) - own_S
        self._shared_S = lengths_S - own_S
        last_S = self.starts_S + own_S - 1
        tokens = torch.arange(self.total)
        positions = tokens - (self.starts_S - self._shared_S).repeat_interleave(own_S, output_size=self.total)
        self._equal = len(set(lengths)) == 1 and not any(shared)  # the row is then a batch without padding
        groups = _of_similar_length(lengths)
        self._shapes = [(len(group), lengths[group[0]]) for group in groups]
        # slots: index of the token at each position of the padded groups, one group after another; padding repeats the
        # sequence's last token. places: position of each token in the padded groups. again, again_at: tokens that a
        # second sequence shares, and their positions in it.
        slots, again, again_at, places, first = [], [], [], torch.empty_like(tokens), 0
        for group, (count, width) in zip(groups, self._shapes, strict=True):
            rows, place = torch.tensor(group)[:, None], tokens[:width]
            token = self.token_at(rows, torch.minimum(place, lengths_S[rows] - 1)).flatten()
            repeated = place < self._shared_S[rows]
            found = ((place < lengths_S[rows]) & ~repeated).flatten().nonzero()[:, 0]
            places[token[found]] = first + found
            found = repeated.flatten().nonzero()[:, 0]
            again.append(token[found])
            again_at.append(first + found)
            slots.append(token)
            first += count * width
        indices = (positions, last_S, torch.cat(slots), places, torch.cat(again), torch.cat(again_at))
        positions, self.last_S, self._slots, self._places, self._again, self._again_at = indices_to_device(
            indices, device
        )
        self.position_ids = positions[None]
        self.counts_N: Tensor | None = None
        if any(shared):
            self.counts_N = torch.ones(self.total, device=device).index_fill_(0, self._again, 2.0)

    def token_at(self, sequence: Tensor, place: Tensor) -> Tensor:
        """Index in the row of the token at `place` of `sequence`; on the CPU, for tensors that broadcast."""
        shared, start = self._shared_S[sequence], self.starts_S[sequence]
        return torch.where(place < shared, self.starts_S[sequence - 1] + place, start - shared + place)

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
            lengths_S1 = torch.tensor(self.lengths)[:, None]
            sequences, place = torch.arange(len(lengths_S1))[:, None], torch.arange(int(lengths_S1.max()))
            token = self.token_at(sequences, torch.minimum(place, lengths_S1 - 1))
            real = place < lengths_S1
            own = real & (place >= self._shared_S[:, None])
            indices = (token.flatten(), own.flatten().nonzero()[:, 0], real.long().flatten())
            slots, places, mask = indices_to_device(indices, self.last_S.device)
            shape = tuple(token.shape)
            self._padded = Padded(slots.view(shape), places, mask.view(shape))
        return self._padded

    def _groups(self, x: Tensor) -> Iterator[Tensor]:
        """Split into padded groups: [1, heads, N, d] -> [sequences, heads, width, d] of each group."""
        rows = x[0].transpose(0, 1)
        if not self._equal:
            # No gradient is passed back from padding. That gradient is zero, because outputs at padding are dropped.
            if self.counts_N is None:
                rows = Gather.apply(rows, self._slots, self._places, 1)
            else:
                rows = _GatherShared.apply(rows, self._slots, self._places, self._again, self._again_at)
        sizes = [count * width for count, width in self._shapes]
        for part, shape in zip(rows.split(sizes), self._shapes, strict=True):
            yield part.unflatten(0, shape).transpose(1, 2)


class _GatherShared(torch.autograd.Function):
    """Gather rows into the padded groups; the gradient of a row in two sequences is the sum of both."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, places: Tensor, again: Tensor, again_at: Tensor) -> Tensor:
        ctx.save_for_backward(places, again, again_at)
        return rows.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        places, again, again_at = ctx.saved_tensors
        grads = grad.index_select(0, places)
        both = grads.index_select(0, again) + grad.index_select(0, again_at)
        return grads.index_copy_(0, again, both), None, None, None, None


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
