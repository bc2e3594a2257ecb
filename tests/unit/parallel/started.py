"""Start a Python file on several ranks, as align's launcher does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from align.launch.processes import free_port

ROOT = Path(__file__).parents[3]


def run_ranks(file: str, ranks: int, folder: Path, *arguments: str) -> None:
    """Run tests/unit/parallel/FILE FOLDER ARGUMENTS on all ranks, with stderr in folder/RANK.log."""
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with open(folder / f"{rank}.log", "wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name(file)), str(folder), *arguments],
                    env={**os.environ, **place, **own, "PYTHONPATH": str(ROOT)},
                    stderr=log,
                )
            )
    try:
        codes = [process.wait(560) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * ranks, (folder / "0.log").read_text()[-3000:]
