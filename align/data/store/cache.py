"""Entries of the cache folder: their arrays, the note of their last use, and the removal of old ones."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

import numpy as np

from align.run.cache import write_atomically

UNUSED_DAYS = 30
"""Entries that no run has opened for this long are removed when another entry is built."""
_USED = "used"


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an array under another name and rename it."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomically(path, buffer.getvalue())


def mark_used(entry: Path) -> None:
    """Note that a run opens the entry now. A cache that is only readable is used without the note."""
    try:
        (entry / _USED).touch()
    except OSError:
        return


def remove_unused(entries: Path, *, keep: Path, days: float = UNUSED_DAYS) -> None:
    """Remove the entries that were last opened more than `days` ago, except `keep`.

    A process that still maps a removed entry keeps its data.
    """
    oldest = time.time() - days * 86400
    for entry in entries.iterdir() if entries.is_dir() else ():
        if entry == keep or not entry.is_dir():
            continue
        try:
            used = max((entry / name).stat().st_mtime for name in (_USED, ".") if (entry / name).exists())
        except (OSError, ValueError):
            continue
        if used < oldest:
            shutil.rmtree(entry, ignore_errors=True)
