"""Grouping of a step's rows into forward passes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from align.train.passes import (
    Example,
    PackedPass,
    Totals,
    best_fit,
    common_start,
    parts_of_rank,
    split_into_passes,
    totals_of,
)


def example(*lengths: int, shared: int = 0) -> Example:
    ids = tuple(torch.arange(length) for length in lengths)
    return Example(ids, tuple(torch.arange(length) > 0 for length in lengths), shared)


@pytest.mark.parametrize("seed", range(20))
def test_passes_hold_every_row_once_within_the_capacity(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 130) for _ in range(draw.randint(1, 40))]
    for ranks in (1, 2, 3):
        passes = split_into_passes(sizes, 100, ranks)
        assert sorted(itertools.chain(*passes)) == list(range(len(sizes)))
        assert all(sum(sizes[item] for item in members) <= 100 or len(members) == 1 for members in passes)


def test_best_fit_takes_the_fullest_pass_with_space() -> None:
    """By hand: 7 and 6 open passes, 4 goes to 6, 3 goes to 7, and 2 opens a third pass."""
    assert best_fit([7, 6, 4, 3, 2], 10) == [[0, 3], [1, 2], [4]]
    assert best_fit([12, 3], 10) == [[0], [1]]


def test_no_rank_is_idle_if_there_are_enough_rows() -> None:
    """All rows would fit in one pass; on four ranks there are four passes of equal size."""
    assert [len(members) for members in split_into_passes([10] * 8, 1000, 4)] == [2, 2, 2, 2]
    assert len(split_into_passes([10, 10], 1000, 4)) == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_rank_runs_the_same_number_of_passes_and_each_row_counts_once(ranks: int) -> None:
    examples = [example(length) for length in (9, 5, 30, 2, 7, 7, 1)]
    parts = [list(parts_of_rank(examples, 20, rank, ranks)) for rank in range(ranks)]
    assert len({len(own) for own in parts}) == 1
    counted = [item for own in parts for part in own if part.counts for item in part.items]
    assert sorted(counted) == list(range(7))


def test_a_pass_predicts_the_tokens_of_the_masks() -> None:
    """Sequence 1 shares three tokens and has one with a loss; the token before it is in sequence 0."""
    first = Example(
        (torch.tensor([5, 6, 7, 8, 9]), torch.tensor([5, 6, 7, 1])),
        (torch.tensor([0, 0, 0, 1, 1]).bool(), torch.tensor([0, 0, 1, 1]).bool()),
        shared=3,
    )
    second = Example((torch.tensor([2, 3]), torch.tensor([2, 4])), (torch.tensor([0, 1]).bool(),) * 2)
    packed = PackedPass([first, second], torch.device("cpu"))
    assert packed.tokens_1P.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 2, 4]]
    assert packed.predicting_N.tolist() == [2, 3, 1, 2, 6, 8]
    assert packed.predicted_N.tolist() == [8, 9, 7, 1, 3, 4]
    assert packed.sequence_N.tolist() == [0, 0, 1, 1, 2, 3]
    assert packed.packing.last_S.tolist() == [4, 5, 7, 9]
    assert packed.by_sequence(torch.arange(1.0, 7.0)).tolist() == [3.0, 7.0, 5.0, 6.0]
    assert packed.loss_tokens_S.tolist() == [2, 2, 1, 1]
    assert totals_of([first, second]) == Totals(2, 13, 6, 3)


def test_the_common_start_leaves_a_token_to_the_second_sequence() -> None:
    def common(first: list[int], second: list[int]) -> int:
        return common_start(torch.tensor(first), torch.tensor(second))

    assert common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common([1, 2, 3], [1, 2]) == 1
    assert common([1, 2], [1, 2, 3]) == 2
    assert common([1], [2]) == 0
