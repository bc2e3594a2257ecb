"""The tiny recipe from the command line: every stage learns, and a run killed in each stage gives the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.forked import VLLM, Forked, align
from tests.integration.runs import metrics

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]
WORDS = ["run", "tiny"]
KILL_AFTER = {"pretrain": 30, "sft": 25, "reward_model": 12, "dpo": 8, "ppo": 6}
"""Lines of metrics.jsonl after which a stage is killed: past its first checkpoint, before its last."""


def fork(run_dir: Path, *arguments: str) -> Forked:
    """Start `align run tiny` in a process that does not load the libraries again; see `forked`."""
    return align([*WORDS, "--run-dir", str(run_dir), *arguments], os.environ, libraries=VLLM)


def final(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / stage / "manifest.json").read_text(encoding="utf-8"))["metrics"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("chain") / "run"
    command = [sys.executable, "-m", "align.cli", *WORDS, "--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run_dir


def test_every_stage_learns(finished) -> None:
    pretrain, sft = metrics(finished, "pretrain"), metrics(finished, "sft")
    assert pretrain[-1]["loss"] < pretrain[0]["loss"] - 1.5
    assert sft[-1]["eval_loss"] < sft[0]["eval_loss"] - 0.25
    assert final(finished, "reward_model")["eval_accuracy"] > 0.8
    assert final(finished, "dpo")["eval_rewards/accuracies"] > 0.7
    scores = [line["score_mean"] for line in metrics(finished, "ppo")]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4
    after = final(finished, "evaluate")
    assert after["ppo/scores"] > after["sft/scores"] > after["base/scores"]
    assert after["ppo/f1"] > after["base/f1"]
    assert max(line["mismatch_max"] for line in metrics(finished, "ppo")) < 1e-3


def test_the_report_shows_the_results(finished) -> None:
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert {stage["name"] for stage in report["stages"]} == {"base", "pairs", "evaluate", *KILL_AFTER}
    assert {stage["status"] for stage in report["stages"]} == {"finished"}
    results = json.loads((finished / "evaluate" / "results.json").read_text(encoding="utf-8"))
    assert set(results["models"]) == {"base", "sft", "dpo", "ppo"}
    scores = results["models"]["ppo"]["scores"]
    shown = next(metric for metric in report["evaluations"][0]["metrics"] if metric["key"] == "scores")
    assert shown["models"]["ppo"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert (finished / "report.html").stat().st_size > 50_000


def test_a_finished_run_is_kept(finished) -> None:
    before = (finished / "sft" / "manifest.json").read_text(encoding="utf-8")
    process = fork(finished)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    assert "ppo: finished before, kept" in output
    assert (finished / "sft" / "manifest.json").read_text(encoding="utf-8") == before


def test_chat_runs_on_a_trained_stage(finished) -> None:
    command = [sys.executable, "-m", "align.cli", "chat", str(finished / "ppo"), "--max-new-tokens", "8"]
    done = subprocess.run(command, input="What does len do?\nAnd abs?\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_killed_in_every_stage_ends_like_an_uninterrupted_one(finished, tmp_path) -> None:
    run_dir = tmp_path / "run"
    for stage, lines in KILL_AFTER.items():
        kill_during(run_dir, stage, lines)
    kill_during(run_dir, "evaluate", 0)
    process = fork(run_dir, "--resume")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    for stage in KILL_AFTER:
        assert metrics(run_dir, stage) == metrics(finished, stage), stage
    assert final(run_dir, "evaluate") == final(finished, "evaluate")


def kill_during(run_dir: Path, stage: str, lines: int) -> None:
    """Run until the stage has written more than `lines` lines of metrics (0: its config.json), then send SIGKILL."""
    file = run_dir / stage / ("metrics.jsonl" if lines else "config.json")
    process = fork(run_dir, "--resume")
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        if file.is_file() and len(file.read_text(encoding="utf-8").splitlines()) > lines:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL, f"{stage} ended before it could be killed"
