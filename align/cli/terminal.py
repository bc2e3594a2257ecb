"""Print to a terminal: coloured lines, and a status line that the next line overwrites."""

from __future__ import annotations

import os
import shutil
import sys
import time

ERASE = "\r\x1b[2K"
LOG_EVERY = 10.0
"""Seconds between two lines of progress in a log."""
_logged = float("-inf")
"""Time of the last of them."""


def say(line: str) -> None:
    if not sys.stdout.isatty():
        print(line, flush=True)
        return
    if not line.startswith(" "):
        name, _, rest = line.partition(":")
        line = f"{color(name, 36)}:{rest}"
    print(f"{ERASE}{line}", flush=True)


def status(line: str) -> None:
    """Print a line that the next one overwrites; only on a terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print(f"{ERASE}{line[: width - 1]}", end="", flush=True)


def progress(line: str) -> None:
    """Show how far a long step is: as `status` on a terminal, in a log one line every `LOG_EVERY` seconds."""
    global _logged
    if sys.stdout.isatty():
        status(line)
    elif line and time.monotonic() - _logged >= LOG_EVERY:
        _logged = time.monotonic()
        print(line, flush=True)


def color(text: str, code: int) -> str:
    plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"
