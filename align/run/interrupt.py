"""Requests to stop a run: SIGTERM, or SIGINT (Ctrl-C) once.

A training loop polls `stop_requested` between two steps (`align.parallel.group.should_stop` if there are several
ranks), writes a checkpoint when it is true, and calls `stop`. A stage that never polls is interrupted at once. A second
signal interrupts any stage at once. Either way the process exits with 128 + the signal's number, and the run can be
resumed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

GRACE = 300.0
"""Seconds that a training loop has for its step and its checkpoint."""
REPEATED = 1.0
"""Seconds within which a second signal is a copy of the first: a terminal, Slurm and a launcher each send their own."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {name(number)}")
        self.number = number


class _Request:
    number = 0
    """The signal that asked this process to stop; 0: none has."""
    since = 0.0
    polled = False
    """A training loop is polling, so it will see a request by itself."""


def name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def listen() -> None:
    """Handle SIGTERM and SIGINT in this process; the main thread must call it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)


def stop_requested() -> bool:
    """True once this process has been asked to stop. Training loops call it between two steps."""
    return poll() > 0


def poll() -> int:
    """As `stop_requested`, with the signal's number; 0: no request."""
    _Request.polled = True
    return _Request.number


def note(number: int) -> None:
    """Record a request that another rank has received."""
    _Request.number = _Request.number or number


def stop() -> NoReturn:
    """End the run, once a checkpoint is written."""
    raise Stopped(_Request.number or signal.SIGTERM)


def requested_by() -> int:
    """The signal that asked this process to stop, or 0; unlike `poll`, no promise to look again."""
    return _Request.number


def stop_polling() -> None:
    """No training loop polls any more: until one does, a signal interrupts at once."""
    _Request.polled = False


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Request.number and now - _Request.since < REPEATED:
        return
    first = not _Request.number
    _Request.number, _Request.since = _Request.number or number, now
    if not (first and _Request.polled):
        raise Stopped(_Request.number)
    line = f"{name(number)}: stopping with a checkpoint after this step (within {GRACE:.0f} s; again: at once)\n"
    os.write(2, line.encode())  # print may not be entered again in a signal handler
    timer = threading.Timer(GRACE, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
