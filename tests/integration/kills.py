"""kill -9 of one rank, at a moment that can be seen in the run folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def kill_last_rank(launcher: subprocess.Popen, moment: Callable[[], bool]) -> None:
    """Kill it as soon as the moment has come; all ranks are held while that is looked at once more."""
    deadline = time.monotonic() + 600
    while not (moment() and killed_if(moment, launcher)):
        assert time.monotonic() < deadline
        assert launcher.poll() is None, f"the run was over before the moment came: {launcher.communicate()[0][-2000:]}"
        time.sleep(0.001)
    clock = time.monotonic()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert time.monotonic() - clock < 30
    assert re.search(r"rank \d was ended by SIGKILL", output)


def killed_if(moment: Callable[[], bool], launcher: subprocess.Popen) -> bool:
    pids = rank_processes(launcher)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    still = moment()
    if still:
        os.kill(pids[-1], signal.SIGKILL)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return still


def rank_processes(launcher: subprocess.Popen) -> list[int]:
    """Process ids by rank: the launcher starts them in order, and nothing else."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
