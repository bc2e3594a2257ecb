"""Start a Python file on several ranks, as align's launcher does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from align.launch.processes import free_port
from tests.integration import forked
from tests.integration.forked import Forked

ROOT = Path(__file__).parents[3]


def run_ranks(file: str, ranks: int, folder: Path, *arguments: str, forks: bool = False) -> None:
    """Run tests/unit/parallel/FILE FOLDER ARGUMENTS on all ranks, with stderr in folder/RANK.log.

    forks: ranks other than 0 do not load the libraries again; see `forked`. Rank 0 has its own order of sets.
    """
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program, words = Path(__file__).with_name(file), [str(folder), *arguments]
    started: list[subprocess.Popen | Forked] = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment = {**os.environ, **place, **own, "PYTHONPATH": str(ROOT)}
        log = folder / f"{rank}.log"
        if forks and rank > 0:
            started.append(forked.script(program, words, environment, log))
        else:
            with log.open("wb") as stderr:
                started.append(subprocess.Popen([sys.executable, str(program), *words], env=environment, stderr=stderr))
    try:
        codes = [process.wait(560) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * ranks, (folder / "0.log").read_text()[-3000:]
