"""PPO on two ranks against one process, on the same rollout batches: metrics, weights, EMA, resumed states, scores."""

from __future__ import annotations

import json

import pytest

from tests.unit.parallel.started import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CASES = [
    "zero 3",
    "zero 0",
    "zero 3, expert parallel 2",
    "zero 1, expert parallel 2",
    "zero 2, expert parallel 2, the critic's head",
    "zero 3, expert parallel 2, activation checkpointing",
    "zero 3, the sampler's log-probabilities",
    "kl stop, zero 3",
    "kl stop, zero 2",
    "kl stop, zero 0",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("ppo_ranks.py", 2, folder, forks=True)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_an_update_equals_that_of_one_process(found: dict, case: str) -> None:
    """Covers updates of policy and critic in turn, and ranks with unequal numbers of micro-batches."""
    first, second = found[case]["metrics"]
    # AdamW amplifies rounding differences of gradients near zero. An iteration that stops at the KL limit computes its
    # last metrics right after an update.
    assert first < (1e-4 if case.startswith("kl stop") else 1e-5)
    assert second < 1e-4
    assert found[case]["weights"] < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_each_rank_keeps_the_ema_of_its_shard(found: dict, case: str) -> None:
    """The EMA equals its closed form, from the weights after each of two iterations, and the EMA of one process."""
    assert found[case]["ema by hand"] < 1e-6
    assert found[case]["ema"] < 1e-4
    assert found[case]["weights after swapping the ema"] == 0


def test_the_cases_skip_the_updates_that_they_should(found: dict) -> None:
    """The numbers of policy updates show full iterations, a critic-only iteration and iterations that stop early."""
    assert found["zero 3"]["updates"] == [6, 6]
    assert found["zero 3, expert parallel 2"]["updates"] == [0, 5]
    assert found["kl stop, zero 3"]["updates"] == found["kl stop, zero 2"]["updates"]
    assert sum(found["kl stop, zero 2"]["updates"]) < 6


def test_resumed_learners_continue_bit_for_bit(found: dict) -> None:
    assert found["resumed"]["the same"] == [0, 0]
    apart, ranks_apart, moved = found["resumed in bf16"]
    assert apart == ranks_apart == 0 < 1e-3 < moved


@pytest.mark.parametrize("reader", ["zero 2", "zero 0"])
def test_learners_and_ema_load_with_other_parallel_settings(found: dict, reader: str) -> None:
    metrics, ema = found["resumed"][reader]
    assert metrics < 1e-4
    assert ema < 1e-5


@pytest.mark.parametrize(
    ("case", "share"),
    [("zero 3", 0.5), ("zero 3, expert parallel 2", 0.5), ("zero 2, expert parallel 2", 0.84), ("zero 0", 1.0)],
)
def test_a_sharded_reward_model_scores_like_an_unsharded_one(found: dict, case: str, share: float) -> None:
    """Covers an odd number of micro-batches, a batch of only two rows, and the fraction of the model on each rank."""
    scores = found["scores"]
    assert scores["standard deviation"] > 0.1
    assert scores[case]["difference"] < 1e-6
    assert scores[case]["again"] < 1e-6
    assert scores[case]["local share"] <= share + 0.01


@pytest.mark.parametrize("case", ["zero 3, expert parallel 2", "zero 0"])
def test_a_loss_that_is_not_finite_stops_all_ranks_with_the_same_error(found: dict, case: str) -> None:
    stopped = found[f"a loss that is not finite, {case}"]
    assert stopped["errors"][0].startswith("PPO step 1, policy: policy_loss is nan")
    assert stopped["errors"][0] == stopped["errors"][1]
    assert stopped["moved"] == 0
