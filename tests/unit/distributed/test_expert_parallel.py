"""Two and four ranks against one process in plain torch: losses, gradient norms, exports, resumed states."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.distributed.launch import free_port

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    place = {"WORLD_SIZE": str(request.param), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder)],
            env={
                **os.environ,
                **place,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "PYTHONWARNINGS": "ignore",
            },
            stderr=open(folder / f"{rank}.log", "wb"),  # noqa: SIM115 (lives as long as the rank)
        )
        for rank in range(request.param)
    ]
    try:
        codes = [rank.wait(560) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * request.param, (folder / "0.log").read_text()[-3000:]
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize(
    "case",
    [
        "zero 3",
        "zero 3, experts over 2",
        "zero 2, experts over 2",
        "zero 1, experts over 2",
        "offload",
        "activation checkpointing",
        "experts without tokens",
    ],
)
def test_losses_and_gradient_norms_are_those_of_one_process(found: dict, case: str) -> None:
    """Top-1 weights, capacity, recycling, balance and z-loss, clipping, accumulation, expert learning rates."""
    assert found[case] < 1e-5


def test_bf16_is_near(found: dict) -> None:
    assert found["bf16"] < 0.02


def test_an_export_is_what_one_process_saves(found: dict) -> None:
    assert found["export at the start"] == 0
    assert found["export at the end"] < 1e-5


@pytest.mark.parametrize(
    "reader",
    ["zero 3, experts over 2", "zero 3", "zero 2, experts over 2", "zero 1, experts over 2", "offload"],
)
def test_a_state_is_read_by_any_other_arrangement(found: dict, reader: str) -> None:
    assert found[f"state read by {reader}"] < 1e-5


@pytest.mark.parametrize("reader", ["zero 3, experts over 2", "zero 3", "zero 2, experts over 2", "offload"])
def test_each_rank_reads_its_own_part(found: dict, reader: str) -> None:
    assert found[f"loaded for {reader}"] < 1e-5
    shares = found[f"shares read for {reader}"]
    if "zero 2" in reader:
        assert max(shares) < 0.85  # all but the other ranks' experts
    else:
        assert sum(shares) == pytest.approx(1, abs=0.15)  # headers are bytes, too
        assert max(shares) < 1.1 / len(shares)
