"""The rows of an optimizer step as forward passes without padding.

A row is one sequence of tokens, or a pair of them. Whole rows are packed into passes of at most a given number of
tokens. Neither loss nor gradient depends on the split, because every loss is normalised by the totals of the step; the
balance loss of a router is the only exception.

Shapes: S sequences, P tokens of a pass, N tokens with a loss, D hidden.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.data.transfer import indices_to_device, to_device
from align.models.family import Trunk, TrunkOutput
from align.models.packing import Packing


@dataclass(frozen=True)
class Example:
    """A row of the data as sequences that must be in the same pass.

    ids: token ids of each sequence [T].
    masks: for each sequence, True at the tokens whose log-probability the loss needs [T], never at the first token.
        Empty if the loss needs no log-probabilities.
    shared: length of the prefix that the second sequence has in common with the first; the pass computes it once.
    values: other numbers that the loss needs, such as log-probabilities under the reference.
    """

    ids: tuple[Tensor, ...]
    masks: tuple[Tensor, ...] = ()
    shared: int = 0
    values: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(map(len, self.ids))

    @property
    def computed(self) -> int:
        """Number of tokens that a pass computes."""
        return self.tokens - self.shared


class Totals(NamedTuple):
    """Totals of an optimizer step, which normalise the losses of its passes.

    rows: number of rows, which may be pairs.
    tokens: number of tokens, padding excluded; a shared token counts in both sequences.
    loss_tokens: number of tokens with a loss.
    first_loss_tokens: those of each row's first sequence, for a pair the chosen one.
    desirable: number of rows that are labelled desirable.
    kl: KTO's estimate of the KL between policy and reference.
    """

    rows: int
    tokens: int
    loss_tokens: int
    first_loss_tokens: int
    desirable: int = 0
    kl: float = 0.0


def totals_of(examples: Sequence[Example]) -> Totals:
    counts = [[int(mask.sum()) for mask in example.masks] for example in examples]
    return Totals(
        rows=len(examples),
        tokens=sum(example.tokens for example in examples),
        loss_tokens=sum(map(sum, counts)),
        first_loss_tokens=sum(count[0] for count in counts if count),
    )


def common_start(first: Tensor, second: Tensor) -> int:
    """Length of the common prefix of two sequences; the last token of the second never counts."""
    length = min(len(first), len(second) - 1)
    different = (first[:length] != second[:length]).nonzero()
    return int(different[0]) if len(different) else length


def split_into_passes(sizes: Sequence[int], capacity: int, ranks: int = 1) -> list[list[int]]:
    """Indices of the items of each pass, in order.

    The items are distributed evenly over the passes. The number of passes is that of best-fit decreasing, rounded up to
    a multiple of `ranks` if there are enough items, so that no rank is idle. If the even distribution would exceed the
    capacity, the passes are those of best-fit decreasing. An item larger than `capacity` has a pass of its own.
    """
    packed = best_fit(sizes, capacity)
    wanted = min(len(sizes), math.ceil(len(packed) / ranks) * ranks)
    even = _evenly(sizes, wanted)
    passes = even if max(map(len, even)) and _fits(even, sizes, capacity) else packed
    return [sorted(members) for members in passes]


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, largest first, goes to the fullest pass that has space for it."""
    passes: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, number of the pass), ascending
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        found = bisect_left(space, (sizes[item], -1))
        if found < len(space):
            free, number = space.pop(found)
        else:
            free, number = capacity, len(passes)
            passes.append([])
        passes[number].append(item)
        insort(space, (free - sizes[item], number))
    return passes


def _evenly(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Distribute the items over `count` passes: each item, largest first, goes to the pass with the fewest tokens."""
    passes: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        load, number = loads.pop(0)
        passes[number].append(item)
        insort(loads, (load + sizes[item], number))
    return passes


def _fits(passes: list[list[int]], sizes: Sequence[int], capacity: int) -> bool:
    return all(sum(sizes[item] for item in members) <= capacity or len(members) == 1 for members in passes)


class Part(NamedTuple):
    """A rank's pass.

    items: indices of its examples.
    counts: False if the pass repeats another rank's pass, because every rank runs the same number of passes.
    """

    items: list[int]
    counts: bool


def parts_of_rank(examples: Sequence[Example], capacity: int, rank: int, ranks: int) -> Iterator[Part]:
    """The passes of this rank; pass j goes to rank j mod `ranks`. Every rank yields the same number of passes.

    ZeRO and expert parallelism need every rank in every pass. If fewer passes than ranks remain at the end, the other
    ranks repeat the first of these passes, which does not count.
    """
    passes = split_into_passes([example.computed for example in examples], capacity, ranks)
    for start in range(0, len(passes), ranks):
        index = start + rank
        counts = index < len(passes)
        yield Part(passes[index if counts else start], counts)


class PackedPass:
    """Examples as one packed row of P tokens.

    examples: the rows, in order; the sequences of a row are adjacent.

    tokens_1P: token ids.
    packing: boundaries of the S sequences.
    predicting_N, predicted_N: index of the token before each token with a loss, and the id of that token.
    sequence_N: number of its sequence.
    loss_tokens_S: number of tokens with a loss of each sequence, on the CPU.
    values: the values of each example [examples, values per example], in float64; host_values: on the CPU.
    tokens: number of tokens, where a shared token counts in both sequences.
    """

    def __init__(self, examples: Sequence[Example], device: torch.device):
        ids = [ids for example in examples for ids in example.ids]
        shared = [example.shared if number else 0 for example in examples for number in range(len(example.ids))]
        self.packing = Packing([len(sequence) for sequence in ids], device, shared)
        self.tokens = sum(map(len, ids))
        row = torch.cat([sequence[common:] for sequence, common in zip(ids, shared, strict=True)]).long()
        flat, sequence, predicting = (torch.zeros(0, dtype=torch.long) for _ in range(3))
        if examples[0].masks:
            ends_S = torch.tensor(self.packing.lengths).cumsum(0)
            flat = torch.cat([mask for example in examples for mask in example.masks]).nonzero()[:, 0]
            sequence = torch.searchsorted(ends_S, flat, right=True)
            place = flat - ends_S[sequence] + torch.tensor(self.packing.lengths)[sequence]
            predicting = self.packing.token_at(sequence, place - 1)
        predicted = torch.cat(ids).long()[flat]
        self.loss_tokens_S = torch.bincount(sequence, minlength=len(ids))
        row, self.predicting_N, self.predicted_N, self.sequence_N = indices_to_device(
            (row, predicting, predicted, sequence), device
        )
        self.tokens_1P = row[None]
        self.host_values = torch.tensor([example.values for example in examples], dtype=torch.float64)
        self.values = to_device(self.host_values, device)

    def forward(self, trunk: Trunk, **options: Any) -> TrunkOutput:
        """Forward pass of the trunk; its hidden states are [1, P, D]."""
        return trunk(input_ids=self.tokens_1P, packing=self.packing, use_cache=False, **options)

    def predicting(self, hidden_1PD: Tensor) -> Tensor:
        """Hidden states [N, D] that predict the tokens with a loss."""
        return hidden_1PD[0].index_select(0, self.predicting_N)

    def last(self, hidden_1PD: Tensor) -> Tensor:
        """Hidden states [S, D] of each sequence's last token."""
        return hidden_1PD[0].index_select(0, self.packing.last_S)

    def by_sequence(self, values_N: Tensor) -> Tensor:
        """Sums of the values over each sequence's tokens with a loss [S]."""
        return values_N.new_zeros(len(self.packing.lengths)).index_add(0, self.sequence_N, values_N)
