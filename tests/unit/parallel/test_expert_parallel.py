"""Two and four ranks against one process in plain torch: losses, gradient norms, exports, resumed states."""

from __future__ import annotations

import json

import pytest

from tests.unit.parallel.started import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    run_ranks("ranks.py", request.param, folder, forks=True)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize(
    "case",
    [
        "zero 3",
        "zero 3, expert parallel 2",
        "zero 2, expert parallel 2",
        "zero 1, expert parallel 2",
        "offload",
        "activation checkpointing",
        "experts without tokens",
    ],
)
def test_losses_and_gradient_norms_equal_those_of_one_process(found: dict, case: str) -> None:
    """Covers top-1 routing, capacity, recycling, balance and z-loss, clipping, accumulation, expert learning rates."""
    assert found[case] < 1e-5


def test_bf16_is_near(found: dict) -> None:
    assert found["bf16"] < 0.02


def test_an_export_equals_the_save_of_one_process(found: dict) -> None:
    assert found["export at the start"] == 0
    assert found["export at the end"] < 1e-5


@pytest.mark.parametrize(
    "reader",
    [
        "zero 3, expert parallel 2",
        "zero 3",
        "zero 2, expert parallel 2",
        "zero 1, expert parallel 2",
        "offload",
        "zero 0",
    ],
)
def test_a_state_loads_with_other_parallel_settings(found: dict, reader: str) -> None:
    assert found[f"state read by {reader}"] < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_state_of_zero_1_and_2_is_complete(found: dict, stage: int, dtype: str, tolerance: float) -> None:
    """The optimizer has several parameter groups, but DeepSpeed links moments to parameters only in the first group."""
    assert found[f"state of zero {stage} in {dtype} read by itself"] == 0
    assert found[f"state of zero {stage} in {dtype} read by zero 3"] < tolerance


@pytest.mark.parametrize("reader", ["zero 3, expert parallel 2", "zero 3", "zero 2, expert parallel 2", "offload"])
def test_each_rank_reads_only_its_shard(found: dict, reader: str) -> None:
    assert found[f"loaded for {reader}"] < 1e-5
    shares = found[f"shares read for {reader}"]
    if "zero 2" in reader:
        assert max(shares) < 0.85  # everything except the other ranks' experts
    else:
        assert sum(shares) == pytest.approx(1, abs=0.15)  # file sizes include headers
        assert max(shares) < 1.1 / len(shares)
