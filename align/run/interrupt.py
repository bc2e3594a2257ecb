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
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from align.errors import Stopped, signal_name

GRACE = 300.0
"""Seconds that a training loop has for its step and its checkpoint."""
REPEATED = 1.0
"""Seconds within which a second signal counts as a copy of the first: terminal, Slurm and launcher may all send it."""


class _Request:
    number = 0
    """Number of the signal that asked this process to stop; 0 if there was none."""
    since = 0.0
    polled = False
    """True while a training loop polls. The loop then sees a request without being interrupted."""
    timer: threading.Timer | None = None
    """Sends the signal again after `GRACE` seconds."""


@contextmanager
def listening() -> Iterator[None]:
    """Handle SIGTERM and SIGINT within the block. The main thread must enter it."""
    _Request.number, _Request.polled = 0, False
    before = {number: signal.signal(number, _handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if _Request.timer is not None:  # otherwise it would end a process that has left the block
            _Request.timer.cancel()
            _Request.timer = None
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested() -> bool:
    """True once this process has been asked to stop. Training loops call it between two steps."""
    return poll() > 0


def poll() -> int:
    """Number of the signal that asked this process to stop, or 0. The call counts as polling."""
    _Request.polled = True
    return _Request.number


def note(number: int) -> None:
    """Record a request that another rank has received."""
    _Request.number = _Request.number or number


def stop() -> NoReturn:
    """End the run by raising `Stopped`. Call it after the checkpoint is written."""
    raise Stopped(_Request.number or signal.SIGTERM)


def requested() -> int:
    """Number of the signal that asked this process to stop, or 0. Unlike `poll`, the call does not count as polling."""
    return _Request.number


def stop_polling() -> None:
    """Record that no training loop polls. Until one polls again, a signal interrupts at once."""
    _Request.polled = False


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Request.number and now - _Request.since < REPEATED:
        return
    first = not _Request.number
    _Request.number, _Request.since = _Request.number or number, now
    if not (first and _Request.polled):
        raise Stopped(_Request.number)
    line = (
        f"{signal_name(number)}: stopping with a checkpoint after this step, within {GRACE:.0f} s; send it again to "
        "stop at once\n"
    )
    os.write(2, line.encode())  # print is not reentrant, so a signal handler must not call it
    _Request.timer = threading.Timer(GRACE, os.kill, (os.getpid(), number))
    _Request.timer.daemon = True
    _Request.timer.start()
