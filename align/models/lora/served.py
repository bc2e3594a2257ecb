"""Products with the LoRA factors of several adapters in one batch, where each row has the slot of its adapter.

Shapes: N rows, n rows of one run, S slots, E experts, r rank, R sum of ranks, I inputs, O outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

GATHERED = 2**17
"""Maximum number of values if each row gathers a copy of its own factors. A loop over the adapters needs more
operations, but copies no factors."""
CALLS = 2**18
"""Multiplications that take about as long as two calls of torch with few rows, on one core of a CPU."""


class Run(NamedTuple):
    """Consecutive rows [start, end) of one slot."""

    start: int
    end: int
    slot: int


@dataclass(frozen=True)
class SlotRows:
    """Division of N rows by slot.

    slots: slot of each row [N], -1 for rows without an adapter.
    runs: runs of the rows that have an adapter, in order.
    masks: {`LinearFactors.key`: result of `LinearFactors.mask` for these rows}.
    """

    slots: Tensor
    runs: tuple[Run, ...]
    masks: dict[Hashable, Tensor | None] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(slots_N: Tensor) -> SlotRows | None:
        """Divide rows with these slots; None if no row has an adapter."""
        runs, end = [], 0
        for slot, same in groupby(slots_N.tolist()):
            start, end = end, end + len(list(same))
            if slot >= 0:
                runs.append(Run(start, end, slot))
        return SlotRows(slots_N, tuple(runs)) if runs else None


class Part(NamedTuple):
    """Factors of one adapter on one slice of a layer's outputs. a: [r, I]; b: B transposed [r, O]."""

    outputs: slice
    a: Tensor
    b: Tensor


class LinearFactors:
    """Factors of several adapters on one linear layer. Its outputs have slices, such as queries, keys and values.

    a: A of all adapters on all slices [R, I], ordered by slice, then by slot, each with its own rank.
    slices: per slice with factors its outputs, its columns of R, and its rows of B, transposed [columns, outputs].
    parts: views of the same factors, by slot.
    slots: slot of each column of R.
    ranks: sum of the ranks over the slices, by slot.
    key: equal for layers with equal sizes and ranks.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor], slots: Collection[int]):
        """Copy the factors of these slots. a, b: per slice A [S, r, I] and B [S, O, r], both padded with zeros."""
        ranks = [[_rank(a_SrI[slot], b_SOr[slot]) for slot in slots] for a_SrI, b_SOr in zip(a, b, strict=True)]
        chosen = [list(zip(slots, of_slice, strict=True)) for of_slice in ranks]
        none = a[0].new_empty(0, a[0].shape[2])
        self.a = torch.cat([none, *(a_SrI[slot, :rank] for a_SrI, each in zip(a, chosen) for slot, rank in each)])
        self.slices: list[tuple[slice, slice, Tensor]] = []
        self.parts: dict[int, list[Part]] = {}
        self.ranks: Counter[int] = Counter()
        column = output = 0
        for b_SOr, each in zip(b, chosen):
            outputs, first = slice(output, output := output + b_SOr.shape[1]), column
            b_RO = torch.cat([b_SOr.new_empty(0, b_SOr.shape[1]), *(b_SOr[slot, :, :rank].T for slot, rank in each)])
            for slot, rank in each:
                if rank:
                    rows = slice(column - first, column - first + rank)
                    part = Part(outputs, self.a[column : column + rank], b_RO[rows])
                    self.parts.setdefault(slot, []).append(part)
                    self.ranks[slot] += rank
                    column += rank
            if len(b_RO):
                self.slices.append((outputs, slice(first, column), b_RO))
        self.outputs = output
        self.slots = torch.tensor([slot for each in chosen for slot, rank in each for _ in range(rank)])
        self.key = (output, self.a.shape[1], tuple(slots), *map(tuple, ranks))

    def add(self, out_NO: Tensor, rows_NI: Tensor, division: SlotRows) -> None:
        """Add B_s A_s x to each row of `out_NO` in place, where s is the row's slot; other rows are unchanged.

        The product is computed in the factors' dtype.
        """
        if not self.parts:
            return
        rows_NI = rows_NI.to(self.a.dtype)
        if self.key not in division.masks:
            division.masks[self.key] = self.mask(division)
        mask_NR = division.masks[self.key]
        if mask_NR is not None:
            low_NR = torch.mm(rows_NI, self.a.T).mul_(mask_NR)
            for outputs, columns, b_RO in self.slices:
                _add_product(out_NO[:, outputs], low_NR[:, columns], b_RO)
            return
        for start, end, slot in division.runs:
            for outputs, a_rI, b_rO in self.parts.get(slot, ()):
                _add_product(out_NO[start:end, outputs], rows_NI[start:end] @ a_rI.T, b_rO)

    def mask(self, division: SlotRows) -> Tensor | None:
        """1 where a column of `a` belongs to the row's slot, otherwise 0 [N, R]; None if runs are computed one by one.

        With the mask, a few calls compute the products of all rows with all adapters, and those of a row with other
        adapters than its own are set to zero. For many rows or large ranks that takes more time than the calls.
        """
        rows, columns = len(division.slots), len(self.a)
        own = sum((end - start) * self.ranks[slot] for start, end, slot in division.runs)
        wasted = (rows * columns - own) * (self.a.shape[1] + self.outputs // len(self.slices))
        if wasted > CALLS * len(self.slices) * len(division.runs):
            return None
        return (division.slots[:, None] == self.slots).to(self.a.dtype)


def _add_product(out_NO: Tensor, low_Nr: Tensor, b_rO: Tensor) -> None:
    """Add low b to `out_NO` in place."""
    if out_NO.dtype == b_rO.dtype:
        out_NO.addmm_(low_Nr, b_rO)
    else:
        out_NO += (low_Nr @ b_rO).to(out_NO.dtype)


def _rank(a_rI: Tensor, b_Or: Tensor) -> int:
    """Rank of factors without the zeros at their end; 0 if their product is zero."""
    used = (a_rI.any(1) & b_Or.any(0)).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def add_gathered(out_NO: Tensor, rows_NI: Tensor, a_SrI: Tensor, b_SOr: Tensor, slots_N: Tensor) -> None:
    """Add B_s A_s x to each row of `out_NO` in place, with a copy of the factors for each row."""
    low = torch.bmm(a_SrI.index_select(0, slots_N), rows_NI.unsqueeze(2))
    out_NO += torch.bmm(b_SOr.index_select(0, slots_N), low).squeeze(2).to(out_NO.dtype)


def gathers(rows: int, a: Tensor, b: Tensor) -> bool:
    """True if a copy of the factors for each row is small. a: [..., r, I]; b: [..., O, r]."""
    return rows * a.shape[-2] * (a.shape[-1] + b.shape[-2]) <= GATHERED


class RowGroup(NamedTuple):
    """Consecutive rows of one expert and one slot."""

    expert: int
    slot: int
    size: int


class StackFactors:
    """Factors of adapters on one stack of experts, by vLLM's slot. Only slots with an adapter use memory.

    a: A of the adapters [P, E, r, I], where P counts the adapters and r is their largest rank.
    b: B of the adapters [P, E, O, r].
    place: index of each slot's factors.
    ranks: rank of each slot's factors.
    """

    def __init__(self, experts: int, inputs: int, outputs: int, dtype: torch.dtype):
        self.experts = experts
        self.a = torch.empty(0, experts, 0, inputs, dtype=dtype)
        self.b = torch.empty(0, experts, outputs, 0, dtype=dtype)
        self.place: dict[int, int] = {}
        self.ranks: dict[int, int] = {}

    def add(self, out_NO: Tensor, rows_NI: Tensor, groups: Sequence[RowGroup]) -> None:
        """Add each row's product B A x to `out_NO` in place; rows whose slot has no adapter here are unchanged.

        groups: Division of the N rows.
        """
        held = [group for group in groups if group.slot in self.place]
        if not held:
            return
        rows_NI = rows_NI.to(self.a.dtype)
        if len(held) == len(groups) and gathers(len(rows_NI), self.a, self.b):
            keys = [self.place[g.slot] * self.experts + g.expert for g in groups for _ in range(g.size)]
            slots = torch.tensor(keys, device=rows_NI.device)
            add_gathered(out_NO, rows_NI, self.a.flatten(0, 1), self.b.flatten(0, 1), slots)
            return
        counts = [group.size for group in groups]
        for group, out, rows in zip(groups, out_NO.split(counts), rows_NI.split(counts), strict=True):
            if group.slot in self.place:
                place, rank = self.place[group.slot], self.ranks[group.slot]
                low = rows @ self.a[place, group.expert, :rank].T
                out += (low @ self.b[place, group.expert, :, :rank].T).to(out.dtype)

    def put(self, slot: int, a_ErI: Tensor, b_EOr: Tensor) -> None:
        """Set the factors of a slot."""
        self.remove(slot)
        rank = max(self.a.shape[2], a_ErI.shape[1])
        self.a = torch.cat((_widened(self.a, rank, 2), _widened(a_ErI[None].to(self.a), rank, 2)))
        self.b = torch.cat((_widened(self.b, rank, 3), _widened(b_EOr[None].to(self.b), rank, 3)))
        self.place[slot], self.ranks[slot] = len(self.place), a_ErI.shape[1]

    def remove(self, slot: int) -> None:
        """Free the factors of a slot; a no-op if it has none."""
        if self.place.pop(slot, None) is None:
            return
        kept = list(self.place.values())
        self.a, self.b = self.a[kept], self.b[kept]
        self.place = {held: number for number, held in enumerate(self.place)}


def grouped_rows(experts_N: Tensor, slots_N: Tensor, slots: int) -> tuple[Tensor, list[RowGroup]]:
    """The permutation that sorts rows by expert and slot, and their groups. slots: Number of slots."""
    keys, order = (experts_N * slots + slots_N).sort()
    groups = [RowGroup(key // slots, key % slots, len(list(same))) for key, same in groupby(keys.tolist())]
    return order, groups


def factors_by_expert(a_EI: Tensor, b_OE: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's factors A [E r, I], ordered by expert, and B [O, r E], ordered by rank, as [E, r, I] and [E, O, r]."""
    return a_EI.unflatten(0, (experts, -1)), b_OE.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _widened(factors: Tensor, rank: int, dim: int) -> Tensor:
    """The factors with zeros appended along `dim` up to this rank."""
    missing = rank - factors.shape[dim]
    if not missing:
        return factors
    shape = list(factors.shape)
    shape[dim] = missing
    return torch.cat((factors, factors.new_zeros(shape)), dim)
