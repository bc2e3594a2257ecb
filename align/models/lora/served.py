"""Products with the LoRA factors of several adapters in one batch, where each row has the slot of its adapter.

Shapes: N rows, n rows with an adapter, S slots, E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

GATHERED = 2**17
"""Values up to which each row gathers a copy of its own factors. A loop over the adapters needs more operations, but
copies no factors."""


@dataclass(frozen=True)
class SlotRows:
    """Division of N rows by slot.

    where: indices of the n rows that have an adapter; None if all rows have one.
    slots: slot of each of these rows [n].
    groups: (slot, indices of its rows) of every slot with rows.
    only: the slot that all rows have, if any.
    """

    where: Tensor | None
    slots: Tensor
    groups: tuple[tuple[int, Tensor], ...]
    only: int | None

    @staticmethod
    def of(slots_N: Tensor) -> SlotRows | None:
        """Divide rows with these slots, -1 for rows without an adapter; None if no row has one."""
        present = slots_N.unique().tolist()
        if present == [-1] or not present:
            return None
        if len(present) == 1:
            return SlotRows(None, slots_N, (), present[0])
        where = (slots_N >= 0).nonzero().squeeze(1) if present[0] < 0 else None
        slots = slots_N if where is None else slots_N[where]
        groups = tuple((slot, (slots_N == slot).nonzero().squeeze(1)) for slot in present if slot >= 0)
        return SlotRows(where, slots, groups, None)


def add_product(out_NO: Tensor, rows_NI: Tensor, a_SrI: Tensor, b_SOr: Tensor, division: SlotRows) -> None:
    """Add B_s A_s x to each row of `out_NO` in place, where s is the row's slot; rows without an adapter are unchanged.

    The product is computed in the factors' dtype.
    """
    rows_NI = rows_NI.to(a_SrI.dtype)
    if division.only is not None:
        a_rI, b_Or = a_SrI[division.only], b_SOr[division.only]
        out_NO += ((rows_NI @ a_rI.T) @ b_Or.T).to(out_NO.dtype)
    elif not gathers(len(division.slots), a_SrI, b_SOr):
        for slot, where in division.groups:
            product = (rows_NI.index_select(0, where) @ a_SrI[slot].T) @ b_SOr[slot].T
            out_NO.index_add_(0, where, product.to(out_NO.dtype))
    else:
        add_gathered(out_NO, rows_NI, a_SrI, b_SOr, division.slots, division.where)


def add_gathered(
    out_NO: Tensor, rows_NI: Tensor, a_SrI: Tensor, b_SOr: Tensor, slots_n: Tensor, where: Tensor | None = None
) -> None:
    """Like `add_product`, with a copy of the factors for each row. where: Indices of the n rows; None for all."""
    rows = rows_NI if where is None else rows_NI.index_select(0, where)
    low = torch.bmm(a_SrI.index_select(0, slots_n), rows.unsqueeze(2))
    product = torch.bmm(b_SOr.index_select(0, slots_n), low).squeeze(2).to(out_NO.dtype)
    if where is None:
        out_NO += product
    else:
        out_NO.index_add_(0, where, product)


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
    """

    def __init__(self, experts: int, inputs: int, outputs: int, dtype: torch.dtype):
        self.experts = experts
        self.a = torch.empty(0, experts, 0, inputs, dtype=dtype)
        self.b = torch.empty(0, experts, outputs, 0, dtype=dtype)
        self.place: dict[int, int] = {}

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
                place = self.place[group.slot]
                out += ((rows @ self.a[place, group.expert].T) @ self.b[place, group.expert].T).to(out.dtype)

    def put(self, slot: int, a_ErI: Tensor, b_EOr: Tensor) -> None:
        """Set the factors of a slot."""
        self.remove(slot)
        rank = max(self.a.shape[2], a_ErI.shape[1])
        self.a = torch.cat((_widened(self.a, rank, 2), _widened(a_ErI[None].to(self.a), rank, 2)))
        self.b = torch.cat((_widened(self.b, rank, 3), _widened(b_EOr[None].to(self.b), rank, 3)))
        self.place[slot] = len(self.place)

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
