"""Products of several adapters in one batch equal a loop over rows; slots without factors cost nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.models.lora.served import (
    GATHERED,
    RowGroup,
    SlotRows,
    StackFactors,
    add_product,
    factors_by_expert,
    grouped_rows,
)

INPUTS, OUTPUTS, RANK, SLOTS = 5, 7, 3, 4
MANY = GATHERED // (RANK * (INPUTS + OUTPUTS)) + 1
"""Rows from which the adapters are looped over."""


def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(SLOTS, RANK, INPUTS, generator=generator),
        torch.randn(SLOTS, OUTPUTS, RANK, generator=generator),
    )


@pytest.mark.parametrize(
    "slots",
    [
        [2] * 6,
        [0, 3, 0, 1],
        [-1, 3, -1, 0],
        [-1, 0],
        [[0, 1, 2, 3][i % 4] for i in range(MANY + 9)],
        [[-1, 1, 3][i % 3] for i in range(2 * MANY)],
    ],
    ids=["one slot", "gathered", "gathered with base rows", "one of two", "loop", "loop with base rows"],
)
def test_products_of_mixed_rows(slots: list[int]) -> None:
    a, b = factors()
    rows = torch.randn(len(slots), INPUTS)
    wide = torch.randn(len(slots), OUTPUTS + 4)
    expected = wide.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row, 2 : 2 + OUTPUTS] += b[slot] @ (a[slot] @ rows[row])
    division = SlotRows.of(torch.tensor(slots))
    assert division is not None
    add_product(wide[:, 2 : 2 + OUTPUTS], rows, a, b, division)
    torch.testing.assert_close(wide, expected)
    without = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(wide[without], expected[without])


def test_rows_without_adapters_need_no_product() -> None:
    assert SlotRows.of(torch.tensor([-1, -1])) is None
    assert SlotRows.of(torch.tensor([], dtype=torch.long)) is None


def test_outputs_keep_their_dtype() -> None:
    a, b = factors()
    out = torch.zeros(2, OUTPUTS, dtype=torch.bfloat16)
    division = SlotRows.of(torch.tensor([1, -1]))
    assert division is not None
    add_product(out, torch.ones(2, INPUTS, dtype=torch.bfloat16), a, b, division)
    torch.testing.assert_close(out[0].float(), b[1] @ a[1].sum(1), rtol=1e-2, atol=1e-2)
    assert not out[1].any()


def test_peft_orders_a_by_expert_and_b_by_rank() -> None:
    """PEFT's own product of stacked experts, einsum("o r e, e r i -> e o i")."""
    experts = 4
    a, b = torch.randn(experts * RANK, INPUTS), torch.randn(OUTPUTS, RANK * experts)
    expected = torch.einsum("ore,eri->eoi", b.reshape(OUTPUTS, RANK, experts), a.reshape(experts, RANK, INPUTS))
    a_ErI, b_EOr = factors_by_expert(a, b, experts)
    torch.testing.assert_close(b_EOr @ a_ErI, expected)


@pytest.mark.parametrize("copies", [1, 400], ids=["gathered", "loop"])
def test_a_stack_holds_only_the_slots_that_are_set(copies: int) -> None:
    experts = 2
    stack = StackFactors(experts, INPUTS, OUTPUTS, torch.float32)
    small = torch.randn(experts, 2, INPUTS), torch.randn(experts, OUTPUTS, 2)
    large = torch.randn(experts, 6, INPUTS), torch.randn(experts, OUTPUTS, 6)
    stack.put(3, *small)
    stack.put(1, *large)
    assert stack.a.shape == (2, experts, 6, INPUTS)
    slots, chosen = torch.tensor([3, 1, 0, 3, 1, 3] * copies), torch.tensor([0, 1, 0, 1, 1, 0] * copies)
    rows = torch.randn(len(slots), INPUTS)

    def check(held: dict[int, tuple[Tensor, Tensor]], among: list[int]) -> None:
        chosen_rows = torch.isin(slots, torch.tensor(among)).nonzero().squeeze(1)
        order, groups = grouped_rows(chosen[chosen_rows], slots[chosen_rows], SLOTS)
        found = torch.zeros(len(order), OUTPUTS)
        stack.add(found, rows[chosen_rows[order]], groups)
        for result, row in zip(found, chosen_rows[order].tolist()):
            a, b = held.get(int(slots[row]), (None, None))
            expert = int(chosen[row])
            expected = torch.zeros(OUTPUTS) if a is None or b is None else b[expert] @ (a[expert] @ rows[row])
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
