"""Products with the LoRA factors of several adapters in one batch, where each row has the slot of its adapter.

Shapes: N rows, n rows with an adapter, S slots, E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GATHERED = 64
"""Rows up to which each row gathers its own factors. A loop over the adapters needs more operations, but copies no
factors."""


@dataclass(frozen=True)
class SlotRows:
    """Division of N rows by slot.

    where: indices of the n rows that have an adapter; None if all rows have one.
    slots: slot of each of these rows [n].
    groups: (slot, indices of its rows) of every slot with rows; filled only above `GATHERED` rows.
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
        groups: tuple[tuple[int, Tensor], ...] = ()
        if len(slots) > GATHERED:
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
    elif division.groups:
        for slot, where in division.groups:
            product = (rows_NI.index_select(0, where) @ a_SrI[slot].T) @ b_SOr[slot].T
            out_NO.index_add_(0, where, product.to(out_NO.dtype))
    else:
        rows = rows_NI if division.where is None else rows_NI.index_select(0, division.where)
        low = torch.bmm(a_SrI.index_select(0, division.slots), rows.unsqueeze(2))
        product = torch.bmm(b_SOr.index_select(0, division.slots), low).squeeze(2).to(out_NO.dtype)
        if division.where is None:
            out_NO += product
        else:
            out_NO.index_add_(0, division.where, product)


class StackFactors:
    """Factors of adapters on one stack of experts, by vLLM's slot. Only slots with an adapter use memory.

    a: A of the adapters [P, E, r, I], where P counts the adapters and r is their largest rank.
    b: B of the adapters [P, E, O, r].
    """

    def __init__(self, experts: int, slots: int, inputs: int, outputs: int, dtype: torch.dtype):
        self.experts = experts
        self.a = torch.empty(0, experts, 0, inputs, dtype=dtype)
        self.b = torch.empty(0, experts, outputs, 0, dtype=dtype)
        self._held: list[int] = []
        # The last entry belongs to slot -1, which is no adapter.
        self._place = torch.full((slots + 1,), -1)

    @property
    def is_empty(self) -> bool:
        return not self._held

    def keys(self, slots_N: Tensor, experts_N: Tensor) -> Tensor:
        """Index of each row's factors in the flattened stacks [P E], -1 for rows whose slot has no adapter here."""
        place = self._place[slots_N]
        return torch.where(place < 0, place, place * self.experts + experts_N)

    def add(self, out_NO: Tensor, rows_NI: Tensor, keys_N: Tensor) -> None:
        """Add each row's product B A x to `out_NO` in place. keys_N: the result of `keys`."""
        if (division := SlotRows.of(keys_N)) is not None:
            add_product(out_NO, rows_NI, self.a.flatten(0, 1), self.b.flatten(0, 1), division)

    def put(self, slot: int, a_ErI: Tensor, b_EOr: Tensor) -> None:
        """Set the factors of a slot."""
        self.remove(slot)
        rank = max(self.a.shape[2], a_ErI.shape[1])
        self.a = torch.cat((_widened(self.a, rank, 2), _widened(a_ErI[None].to(self.a), rank, 2)))
        self.b = torch.cat((_widened(self.b, rank, 3), _widened(b_EOr[None].to(self.b), rank, 3)))
        self._held.append(slot)
        self._renumber()

    def remove(self, slot: int) -> None:
        """Free the factors of a slot; a no-op if it has none."""
        if slot not in self._held:
            return
        kept = [place for place, held in enumerate(self._held) if held != slot]
        self._held = [self._held[place] for place in kept]
        self.a, self.b = self.a[kept], self.b[kept]
        self._renumber()

    def _renumber(self) -> None:
        self._place.fill_(-1)
        for place, slot in enumerate(self._held):
            self._place[slot] = place


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
