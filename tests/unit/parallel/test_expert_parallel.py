"""Two and four ranks against one process in plain torch: losses, gradient norms, exports, resumed states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.parallel.started import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


REPLICATED = ["zero 3, expert parallel 2", "zero 2, expert parallel 2", "zero 1, expert parallel 2"]
"""Settings that also run on four ranks, where each expert has two replicas."""


def results(ranks: int, folder: Path) -> dict:
    run_ranks("ranks.py", ranks, folder, forks=True)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=["two", "four"])
def found(request: pytest.FixtureRequest) -> dict:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("case", [*REPLICATED, "experts without tokens"])
def test_losses_and_gradient_norms_equal_those_of_one_process(found: dict, case: str) -> None:
    """Covers top-1 routing, capacity, recycling, balance and z-loss, clipping, accumulation, expert learning rates."""
    assert found[case] < 1e-5


@pytest.mark.parametrize("case", ["zero 3", "offload", "activation checkpointing"])
def test_other_settings_train_as_one_process(two: dict, case: str) -> None:
    assert two[case] < 1e-5


def test_bf16_is_near(two: dict) -> None:
    assert two["bf16"] < 0.02


def test_an_export_equals_the_save_of_one_process(found: dict) -> None:
    assert found["export at the start"] == 0
    assert found["export at the end"] < 1e-5


@pytest.mark.parametrize("reader", REPLICATED)
def test_a_state_loads_with_other_parallel_settings(found: dict, reader: str) -> None:
    assert found[f"state read by {reader}"] < 1e-5


@pytest.mark.parametrize("reader", ["zero 3", "offload", "zero 0"])
def test_a_state_loads_with_other_settings_without_expert_replicas(two: dict, reader: str) -> None:
    assert two[f"state read by {reader}"] < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_state_of_zero_1_and_2_is_complete(two: dict, stage: int, dtype: str, tolerance: float) -> None:
    """The optimizer has several parameter groups, but DeepSpeed links moments to parameters only in the first group."""
    assert two[f"state of zero {stage} in {dtype} read by itself"] == 0
    assert two[f"state of zero {stage} in {dtype} read by zero 3"] < tolerance


@pytest.mark.parametrize("reader", ["zero 3", "offload"])
def test_each_rank_reads_only_its_shard(two: dict, reader: str) -> None:
    require_shards(two, reader)


@pytest.mark.parametrize("reader", REPLICATED[:2])
def test_each_rank_reads_only_its_shard_of_the_experts(found: dict, reader: str) -> None:
    require_shards(found, reader)


def require_shards(found: dict, reader: str) -> None:
    assert found[f"loaded for {reader}"] < 1e-5
    shares = found[f"shares read for {reader}"]
    if "zero 2" in reader:
        assert max(shares) < 0.85  # everything except the other ranks' experts
    else:
        assert sum(shares) == pytest.approx(1, abs=0.15)  # file sizes include headers
        assert max(shares) < 1.1 / len(shares)
