"""A rank that is late, dead or at another step ends the run within seconds, with an error that names it and its step.

Waiting for the work of rank 0 has no time limit. The ranks are processes (control_ranks.py) with short time limits.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from align.parallel.steps import ControlSteps

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[3]
SKIPPED = "rank 1 is at step 2 'save'; rank {rank} is at step 2 'score'"
LATE = r"rank 2 is still at step 1 'load' after 10 seconds; rank {rank} is at step 2 'draw'"
DEAD = r"rank 1 is dead: no heartbeat for 8 seconds; the last step it reached is step 1 'load'; rank {rank} is at"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Results of each scenario by rank; {} for a killed rank."""
    folder = tmp_path_factory.mktemp("ranks")
    script = [sys.executable, str(Path(__file__).with_name("control_ranks.py")), str(folder)]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(script, env={**os.environ, **variables}, check=True, timeout=120)
    found: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("*.json")):
        scenario, _, rank = file.stem.rpartition("-")
        found.setdefault(scenario, [{}, {}, {}])[int(rank)] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize(
    ("scenario", "ranks", "sentence"),
    [
        ("skips_a_step", (0, 2), SKIPPED),
        ("calls_another_step", (1,), "rank 2 is at step 2 'draw'; rank {rank} is at step 2 'score'"),
        ("is_late", (1,), LATE),
        ("is_killed", (2,), DEAD),
        ("loses_rank_0", (1, 2), r"rank 0 is gone \(.*\); rank {rank} is at step 2 'draw'"),
        ("has_a_bug", (1, 2), "rank 0 has failed at step 1 'draw'; rank {rank} is at step 1 'draw'"),
        ("fails_after_the_others", (1, 2), "rank 0 has failed at step 1 'export'; rank {rank} is at step 1 'export'"),
    ],
)
def test_other_ranks_raise_an_error_that_names_the_rank_and_its_step(seen, scenario, ranks, sentence) -> None:
    for rank in ranks:
        raised = seen[scenario][rank]["raised"]
        assert re.match("RankError: " + sentence.format(rank=rank), raised) is not None, raised
        assert seen[scenario][rank]["seconds"] < 40


def test_rank_0_keeps_its_own_exception(seen) -> None:
    assert seen["has_a_bug"][0]["raised"].startswith("ZeroDivisionError: ")


def test_a_users_error_of_rank_0_is_raised_on_every_rank(seen) -> None:
    assert [rank["raised"] for rank in seen["gets_a_users_error"]] == ["UserError: no prompts; add some."] * 3


def test_every_rank_gets_rank_0s_result_however_long_it_takes(seen) -> None:
    results = [rank["result"] for rank in seen["gets_results"]]
    assert results == [["of rank 0", [0.0, 1.0, 2.0], None, is_main] for is_main in (True, False, False)]


def test_a_rank_that_looks_late_gets_the_size_of_its_own_steps_result() -> None:
    """Rank 0 is at the next step already: a broadcast may end on rank 0 before it ends on a rank further away."""
    store = dist.HashStore()
    first, late = (ControlSteps(store, rank, 2) for rank in range(2))
    for number in range(4):
        first.enter(f"draw {number}", "working")
        first.mark("done", 100 + number)
        if number:
            assert late.wait_for_rank_0() == 99 + number
        late.enter(f"draw {number}")
    for steps in (first, late):
        steps.close()


def test_ranks_may_finish_a_block_of_collectives_long_after_each_other(seen) -> None:
    """Without `rank_0_last`, rank 2 would wait at step 'next' and report the other ranks as late."""
    assert [rank["result"] for rank in seen["waits_for_rank_0_to_finish"]] == [[3.0, 3.0]] * 3


def test_a_step_inside_rank_0s_own_work_is_refused(seen) -> None:
    assert "step 'inside' is for all ranks" in seen["nests_steps"][0]["raised"]


def test_ranks_stop_after_the_same_step_when_one_of_them_gets_a_signal(seen) -> None:
    assert [rank["result"] for rank in seen["stops_together"]] == [5, 5, 5]
