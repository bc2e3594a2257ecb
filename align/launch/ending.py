"""End the process of a rank. Every command loads this module, so it imports nothing heavy."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit statuses of a process that was asked to stop."""


_has_joined = False


def has_joined() -> bool:
    """True once this process has joined a process group; the process must then end with `end_process`."""
    return _has_joined


def mark_joined() -> None:
    global _has_joined
    _has_joined = True


def end_process(code: int) -> NoReturn:
    """Exit immediately with `code`, skipping interpreter shutdown.

    Threads of torch's process groups may still need the interpreter. Shutting the interpreter down can then abort the
    process (SIGABRT), even after all its work is done.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):  # the stream is closed, or its reader has ended
            stream.flush()
    os._exit(code)
