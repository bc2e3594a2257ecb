"""Two ranks that learn from the same rounds as one process: what they measure, end with and leave out."""

from __future__ import annotations

import json

import pytest

from tests.unit.distributed.started import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CASES = [
    "zero 3",
    "zero 3, experts over 2",
    "zero 1, experts over 2",
    "zero 2, experts over 2, the critic's head",
    "left out, zero 3",
    "left out, zero 2",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("ppo_ranks.py", 2, folder)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_one_process(found: dict, case: str) -> None:
    """Policy and critic in turn, mini-batches that give the ranks unequal numbers of passes."""
    first, second = found[case]
    assert first < 1e-5
    assert second < 1e-4  # AdamW makes more of the last bits of gradients near zero
    assert found[f"{case}: weights"] < 1e-4


def test_what_is_left_out_was_left_out(found: dict) -> None:
    """The cases are what their names say: whole rounds, rounds of the critic alone, rounds that end early."""
    assert found["zero 3: updates"] == [6, 6]
    assert found["zero 3, experts over 2: updates"] == [0, 5]
    assert found["left out, zero 3: updates"] == found["left out, zero 2: updates"]
    assert sum(found["left out, zero 2: updates"]) < 6


def test_a_resumed_pair_of_learners_goes_on_bit_for_bit(found: dict) -> None:
    assert found["resumed"] == 0


def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any(found: dict) -> None:
    line = found["a loss that is not finite"]
    assert (line["policy_updates"], line["skipped_updates"]) == (2, 1)
    assert 0 < line["policy_grad_norm"] < 100
