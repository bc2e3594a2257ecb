"""`align eval` killed with SIGKILL and resumed: the report of a run that was not killed, and nothing computed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.eval.local_tasks import save_checkpoint, write_tasks

pytestmark = pytest.mark.slow


def command(folder: Path, out: str, *flags: str) -> list[str]:
    tasks = ",".join(str(folder / "tasks" / f"{name}.yaml") for name in ("al_choice", "al_generate"))
    arguments = ["eval", "a", "--tasks", tasks, "--backend", "hf", "--batch-size", "1", "--out", out, *flags]
    return [sys.executable, "-m", "align.cli", *arguments]


def start(folder: Path, out: str, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(folder, out, *flags), cwd=folder, stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a")
    write_tasks(tmp_path / "tasks", documents=48)
    whole = start(tmp_path, "whole")
    printed, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0
    assert "al_generate  exact_match (letter)" in printed
    records = tmp_path / "parts" / "a" / "records.jsonl"
    killed = start(tmp_path, "parts")
    deadline = time.monotonic() + 300
    while not (records.is_file() and records.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = records.read_text().splitlines()
    total = 48 * 5
    assert 3 < len(kept) < total
    resumed = start(tmp_path, "parts", "--resume")
    resumed.communicate(timeout=300)
    assert resumed.returncode == 0
    for name in ("results.json", "results.md", "report.html", "a/scores.jsonl"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text(), name
    lines = records.read_text().splitlines()
    assert lines[: len(kept) - 1] == kept[:-1]
    assert len(lines) == total
    computed = Counter(row["key"] for row in map(json.loads, lines) if row["seconds"] > 0)
    assert max(computed.values()) == 1
