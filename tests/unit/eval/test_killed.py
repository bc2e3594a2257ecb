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

from tests.integration.forked import align
from tests.unit.eval.local_tasks import save_checkpoint, write_tasks

pytestmark = pytest.mark.slow


def words(folder: Path, out: str, *flags: str) -> list[str]:
    """Arguments of `align`."""
    tasks = ",".join(str(folder / "tasks" / f"{name}.yaml") for name in ("al_choice", "al_generate"))
    return ["eval", "a", "--tasks", tasks, "--backend", "hf", "--batch-size", "1", "--out", out, *flags]


def test_killed_and_resumed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a")
    write_tasks(tmp_path / "tasks", documents=48)
    command = [sys.executable, "-m", "align.cli", *words(tmp_path, "whole")]
    whole = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert "al_generate  exact_match (letter)" in whole.stdout
    records = tmp_path / "parts" / "a" / "records.jsonl"
    killed = align(words(tmp_path, "parts"), os.environ, tmp_path)
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
    resumed = align(words(tmp_path, "parts", "--resume"), os.environ, tmp_path)
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    for name in ("results.json", "results.md", "report.html", "a/scores.jsonl"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text(), name
    lines = records.read_text().splitlines()
    assert lines[: len(kept) - 1] == kept[:-1]
    assert len(lines) == total
    computed = Counter(row["key"] for row in map(json.loads, lines) if row["seconds"] > 0)
    assert max(computed.values()) == 1
