"""Kill the last rank of a run with SIGKILL once a condition holds."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

from tests.integration.forked import Forked

Launcher = Popen | Forked


def kill_last_rank(launcher: Launcher, condition: Callable[[], bool]) -> None:
    """Kill the last rank once `condition()` is true; the launcher must end within 30 s and name the signal."""
    deadline = time.monotonic() + 600
    while not (condition() and killed_if(condition, launcher)):
        assert time.monotonic() < deadline
        assert launcher.poll() is None, (
            f"the run ended before the condition was true: {launcher.communicate()[0][-2000:]}"
        )
        time.sleep(0.001)
    clock = time.monotonic()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert time.monotonic() - clock < 30
    assert re.search(r"rank \d was ended by SIGKILL", output)


def killed_if(condition: Callable[[], bool], launcher: Launcher) -> bool:
    """Pause all ranks, check the condition again and, if it still holds, kill the last rank; return True if killed."""
    pids = rank_processes(launcher)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    still = condition()
    if still:
        os.kill(pids[-1], signal.SIGKILL)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return still


def rank_processes(launcher: Launcher) -> list[int]:
    """Process ids in order of rank; the ranks are the only children of the launcher."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
