"""Products of several adapters in one batch equal a loop over rows; slots without factors cost nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.models.lora import served
from align.models.lora.served import (
    LinearFactors,
    RowGroup,
    SlotRows,
    StackFactors,
    factors_by_expert,
    grouped_rows,
)

INPUTS, OUTPUTS, SLOTS = 5, (7, 2, 3), 5
RANKS = (3, 1, 0, 6, 2)
"""Ranks of the slots; the slot 2 holds no adapter."""
LARGEST = 8


def factors() -> tuple[list[Tensor], list[Tensor]]:
    """Padded factors of three slices of the outputs. The last slot has none on the second slice."""
    generator = torch.Generator().manual_seed(0)
    a = [torch.zeros(SLOTS, LARGEST, INPUTS) for _ in OUTPUTS]
    b = [torch.zeros(SLOTS, size, LARGEST) for size in OUTPUTS]
    for number, size in enumerate(OUTPUTS):
        for slot, rank in enumerate(RANKS):
            if (number, slot) != (1, SLOTS - 1):
                a[number][slot, :rank] = torch.randn(rank, INPUTS, generator=generator)
                b[number][slot, :, :rank] = torch.randn(size, rank, generator=generator)
    return a, b


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "by run"])
@pytest.mark.parametrize(
    "slots",
    [[3] * 6, [0, 3, 0, 1], [-1, 3, -1, 0], [-1, 4], [4, 4, -1, 2, 2, 1], [[0, 1, 3, 4][i // 50] for i in range(200)]],
    ids=["one slot", "mixed", "with base rows", "a slice without factors", "a slot without factors", "many rows"],
)
def test_products_of_mixed_rows(slots: list[int], at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CALLS", 2**40 if at_once else -1)
    a, b = factors()
    rows = torch.randn(len(slots), INPUTS)
    out = torch.randn(len(slots), sum(OUTPUTS) + 4)
    expected = out.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            product = torch.cat([b_SOr[slot] @ (a_SrI[slot] @ rows[row]) for a_SrI, b_SOr in zip(a, b)])
            expected[row, 2:-2] += product
    division = SlotRows.of(torch.tensor(slots))
    assert division is not None
    layer = LinearFactors(a, b, range(SLOTS))
    assert (layer.mask(division) is not None) == at_once
    layer.add(out[:, 2:-2], rows, division)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    without = [row for row, slot in enumerate(slots) if slot in (-1, 2)]
    assert torch.equal(out[without], expected[without])


def test_factors_are_copied_without_padding_and_only_of_the_slots_in_use() -> None:
    a, b = factors()
    layer = LinearFactors(a, b, range(SLOTS))
    assert len(layer.a) == 3 * sum(RANKS) - RANKS[-1]
    assert [b_RO.shape for _, _, b_RO in layer.slices] == [(12, 7), (10, 2), (12, 3)]
    few = LinearFactors(a, b, (1, 2))
    assert few.a.shape == (3, INPUTS)
    assert set(few.parts) == {1}
    assert not LinearFactors(a, b, ()).parts
    assert not LinearFactors(a, [torch.zeros_like(each) for each in b], range(SLOTS)).parts


def test_the_rows_and_ranks_decide_how_products_are_computed() -> None:
    """A few rows of several adapters share calls; long prompts are not multiplied by the other prompt's adapter."""
    a = [torch.randn(2, 64, 512)]
    layer = LinearFactors(a, [torch.randn(2, 512, 64)], (0, 1))
    decoding, prompts = SlotRows.of(torch.tensor([0, 1])), SlotRows.of(torch.tensor([0] * 300 + [1] * 300))
    assert decoding is not None
    assert prompts is not None
    assert layer.mask(decoding) is not None
    assert layer.mask(prompts) is None


def test_rows_without_adapters_need_no_product() -> None:
    assert SlotRows.of(torch.tensor([-1, -1])) is None
    assert SlotRows.of(torch.tensor([], dtype=torch.long)) is None


@pytest.mark.parametrize("at_once", [True, False])
def test_outputs_keep_their_dtype(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CALLS", 2**40 if at_once else -1)
    a, b = factors()
    out = torch.zeros(2, sum(OUTPUTS), dtype=torch.bfloat16)
    division = SlotRows.of(torch.tensor([1, -1]))
    assert division is not None
    LinearFactors(a, b, range(SLOTS)).add(out, torch.ones(2, INPUTS, dtype=torch.bfloat16), division)
    expected = torch.cat([b_SOr[1] @ a_SrI[1].sum(1) for a_SrI, b_SOr in zip(a, b)])
    torch.testing.assert_close(out[0].float(), expected, rtol=1e-2, atol=1e-2)
    assert not out[1].any()


def test_peft_orders_a_by_expert_and_b_by_rank() -> None:
    """PEFT's own product of stacked experts, einsum("o r e, e r i -> e o i")."""
    experts = 4
    rank, outputs = 3, 7
    a, b = torch.randn(experts * rank, INPUTS), torch.randn(outputs, rank * experts)
    expected = torch.einsum("ore,eri->eoi", b.reshape(outputs, rank, experts), a.reshape(experts, rank, INPUTS))
    a_ErI, b_EOr = factors_by_expert(a, b, experts)
    torch.testing.assert_close(b_EOr @ a_ErI, expected)


@pytest.mark.parametrize("copies", [1, 400], ids=["gathered", "loop"])
def test_a_stack_holds_only_the_slots_that_are_set(copies: int) -> None:
    experts, outputs = 2, 7
    stack = StackFactors(experts, INPUTS, outputs, torch.float32)
    small = torch.randn(experts, 2, INPUTS), torch.randn(experts, outputs, 2)
    large = torch.randn(experts, 6, INPUTS), torch.randn(experts, outputs, 6)
    stack.put(3, *small)
    stack.put(1, *large)
    assert stack.a.shape == (2, experts, 6, INPUTS)
    slots, chosen = torch.tensor([3, 1, 0, 3, 1, 3] * copies), torch.tensor([0, 1, 0, 1, 1, 0] * copies)
    rows = torch.randn(len(slots), INPUTS)

    def check(held: dict[int, tuple[Tensor, Tensor]], among: list[int]) -> None:
        chosen_rows = torch.isin(slots, torch.tensor(among)).nonzero().squeeze(1)
        order, groups = grouped_rows(chosen[chosen_rows], slots[chosen_rows], SLOTS)
        found = torch.zeros(len(order), outputs)
        stack.add(found, rows[chosen_rows[order]], groups)
        for result, row in zip(found, chosen_rows[order].tolist()):
            a, b = held.get(int(slots[row]), (None, None))
            expert = int(chosen[row])
            expected = torch.zeros(outputs) if a is None or b is None else b[expert] @ (a[expert] @ rows[row])
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)

    check({3: small, 1: large}, [1, 3])
    check({3: small, 1: large}, [0, 1, 3])
    stack.put(3, *large)
    check({3: large, 1: large}, [1, 3])
    stack.remove(1)
    stack.remove(0)
    check({3: large}, [1, 3])
    stack.put(1, *small)
    check({3: large, 1: small}, [1, 3])
    stack.remove(3)
    stack.remove(1)
    assert stack.a.numel() == 0
    check({}, [0, 1, 3])


def test_rows_are_grouped_by_expert_and_slot() -> None:
    order, groups = grouped_rows(torch.tensor([1, 0, 1, 1]), torch.tensor([2, 3, 0, 2]), SLOTS)
    assert groups == [RowGroup(0, 3, 1), RowGroup(1, 0, 1), RowGroup(1, 2, 2)]
    assert order.tolist()[:2] == [1, 2]
