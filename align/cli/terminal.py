"""Print to a terminal: coloured lines, and a status line that the next line overwrites."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

ERASE = "\r\x1b[2K"
LOG_EVERY, LATER = 10.0, 60.0
"""Seconds between two lines of progress in a log, in its first ten minutes and afterwards."""
QUIET, VERBOSE = "ALIGN_QUIET", "ALIGN_VERBOSE"
"""Environment variables that `--quiet` and `--verbose` set."""
_began = time.monotonic()
_logged = float("-inf")
"""Time of the last line of progress."""


@contextmanager
def verbosity(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Apply `--quiet` and `--verbose` to a command. The ranks that it starts inherit both through the environment."""
    chosen = {name for name, wanted in ((QUIET, quiet), (VERBOSE, verbose)) if wanted and name not in os.environ}
    os.environ |= dict.fromkeys(chosen, "1")
    try:
        yield
    finally:
        for name in chosen:
            os.environ.pop(name, None)


def say(line: str) -> None:
    if os.environ.get(QUIET):
        return
    if not sys.stdout.isatty():
        print(line, flush=True)
        return
    if line and not line.startswith(" "):
        name, _, rest = line.partition(":")
        line = f"{color(name, 36)}:{rest}"
    print(f"{ERASE}{line}", flush=True)


def status(line: str) -> None:
    """Print a line that the next one overwrites; only on a terminal."""
    if sys.stdout.isatty() and not os.environ.get(QUIET):
        print(f"{ERASE}{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)


def progress(line: str) -> None:
    """Show how far a long step is: as `status` on a terminal, in a log one line every few seconds.

    With ALIGN_LOG_STEPS=1 in the environment, a log has every line.
    """
    global _logged
    if os.environ.get(QUIET):
        return
    if sys.stdout.isatty():
        status(line)
        return
    now = time.monotonic()
    seconds = LOG_EVERY if now - _began < 600 else LATER
    if line and (now - _logged >= seconds or os.environ.get("ALIGN_LOG_STEPS")):
        _logged = now
        print(line, flush=True)


def width() -> int | None:
    """Columns of the terminal; None if standard output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def color(text: str, code: int) -> str:
    plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"
