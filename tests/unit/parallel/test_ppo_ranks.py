"""Two ranks that learn from the same rounds as one process: what they measure, end with and leave out."""

from __future__ import annotations

import json

import pytest

from tests.unit.parallel.started import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CASES = [
    "zero 3",
    "zero 0",
    "zero 3, experts over 2",
    "zero 1, experts over 2",
    "zero 2, experts over 2, the critic's head",
    "zero 3, experts over 2, recomputed",
    "zero 3, the sampler's log-probabilities",
    "left out, zero 3",
    "left out, zero 2",
    "left out, zero 0",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("ppo_ranks.py", 2, folder)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_one_process(found: dict, case: str) -> None:
    """Policy and critic in turn, mini-batches that give the ranks unequal numbers of passes."""
    first, second = found[case]["metrics"]
    # AdamW makes more of the last bits of gradients near zero, and a round that ends at a limit of the KL is one that
    # was measured right after an update.
    assert first < (1e-4 if case.startswith("left out") else 1e-5)
    assert second < 1e-4
    assert found[case]["weights"] < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_each_rank_averages_its_part_of_the_weights(found: dict, case: str) -> None:
    """The closed form of two rounds' whole weights, as they were gathered after each; and one process's average."""
    assert found[case]["average by hand"] < 1e-6
    assert found[case]["average"] < 1e-4
    assert found[case]["weights after averaging"] == 0


def test_what_is_left_out_was_left_out(found: dict) -> None:
    """The cases are what their names say: whole rounds, rounds of the critic alone, rounds that end early."""
    assert found["zero 3"]["updates"] == [6, 6]
    assert found["zero 3, experts over 2"]["updates"] == [0, 5]
    assert found["left out, zero 3"]["updates"] == found["left out, zero 2"]["updates"]
    assert sum(found["left out, zero 2"]["updates"]) < 6


def test_a_resumed_pair_of_learners_goes_on_bit_for_bit(found: dict) -> None:
    assert found["resumed"]["the same"] == [0, 0]
    apart, ranks_apart, moved = found["resumed in bf16"]
    assert apart == ranks_apart == 0 < 1e-3 < moved


@pytest.mark.parametrize("reader", ["zero 2", "zero 0"])
def test_any_arrangement_reads_the_learners_and_the_average(found: dict, reader: str) -> None:
    metrics, average = found["resumed"][reader]
    assert metrics < 1e-4
    assert average < 1e-5


@pytest.mark.parametrize(
    ("case", "share"),
    [("zero 3", 0.5), ("zero 3, experts over 2", 0.5), ("zero 2, experts over 2", 0.84), ("zero 0", 1.0)],
)
def test_all_ranks_score_as_one(found: dict, case: str, share: float) -> None:
    """An odd number of passes, and fewer rows than ranks have passes; each rank holds its part of the model."""
    scores = found["scores"]
    assert scores["spread of the scores"] > 0.1
    assert scores[case]["difference"] < 1e-6
    assert scores[case]["again"] < 1e-6
    assert scores[case]["held"] <= share + 0.01


@pytest.mark.parametrize("case", ["zero 3, experts over 2", "zero 0"])
def test_a_loss_that_is_not_finite_stops_all_ranks_with_the_same_sentence(found: dict, case: str) -> None:
    stopped = found[f"a loss that is not finite, {case}"]
    assert stopped["errors"][0].startswith("PPO step 1, policy: policy_loss is nan")
    assert stopped["errors"][0] == stopped["errors"][1]
    assert stopped["moved"] == 0
