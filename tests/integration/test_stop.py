"""SIGTERM stops a run of two ranks after a checkpoint; the resumed run equals an uninterrupted one."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from align.run.folder import read_jsonl
from tests.integration.runs import exported, metrics, run, start, write_pretraining

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    write_pretraining(tmp_path, tmp_path, steps=12)
    recipe, uninterrupted, stopped = tmp_path / "recipe.yaml", tmp_path / "uninterrupted", tmp_path / "stopped"
    run(recipe, uninterrupted, forks=True)
    shutil.copytree(uninterrupted / "base", stopped / "base")

    launcher = start(recipe, stopped)
    lines = stopped / "pretrain" / "metrics.jsonl"
    while not (lines.is_file() and len(read_jsonl(lines)) >= 2):
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 143, output
    resume = f"continue with `align run {recipe} --run-dir {stopped} --resume`"
    assert output.splitlines()[-1] == f"stopped by SIGTERM; {resume}"
    last = read_jsonl(lines)[-1]["step"]
    assert last < 12
    assert (stopped / "pretrain" / "checkpoints" / f"checkpoint-{last}" / "complete").is_file()

    assert f"resuming at step {last}\n" in run(recipe, stopped, "--resume", forks=True)
    assert metrics(stopped, "pretrain") == metrics(uninterrupted, "pretrain")
    assert exported(stopped, "pretrain") == exported(uninterrupted, "pretrain")
