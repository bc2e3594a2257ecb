"""Remove rows that repeat an earlier row, over all entries of a mixture.

What is earlier does not depend on the mixture: rows are compared in the order of the sources and of their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.config.filters import DuplicateFilter
from align.data.filters.duplicates import equal_rows, near_duplicates
from align.data.store.cache import write_array
from align.data.store.entry import Entry
from align.run.cache import hashed, locked, writing

REASON = "filter: repeats an earlier row"


def without_duplicates(entries: Sequence[Entry], settings: DuplicateFilter, cache: Path) -> list[Entry]:
    """The entries without the token rows of rows that repeat an earlier one.

    The comparison is kept in the cache, because that of near duplicates takes minutes for a million rows.
    """
    earlier = _earlier_rows(entries, settings, cache)
    parts = np.split(earlier, np.cumsum([len(entry.rows) for entry in entries])[:-1])
    return [entry.without(np.flatnonzero(part >= 0), REASON) for entry, part in zip(entries, parts, strict=True)]


def _earlier_rows(entries: Sequence[Entry], settings: DuplicateFilter, cache: Path) -> np.ndarray:
    """For each row of all entries the number of the row that it repeats, otherwise -1."""
    folder, rows = cache / "duplicates", sum(len(entry.rows) for entry in entries)
    file = folder / f"{hashed([[entry.folder.name for entry in entries], settings.near])}.npy"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(file):
            if (found := _read(file, rows)) is None:
                write_array(file, found := _compare(entries, settings.near))
    return found


def _read(file: Path, rows: int) -> np.ndarray | None:
    """The array of a file; None if it is missing or damaged."""
    try:
        found: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return found if len(found) == rows else None


def _compare(entries: Sequence[Entry], near: float | None) -> np.ndarray:
    found = _numbers(equal_rows(np.concatenate([entry.rows["text"] for entry in entries])))
    if near is not None:
        grams = [row for entry in entries for row in entry.grams()]
        unique = np.flatnonzero(found < 0)
        similar = _numbers(near_duplicates([grams[row] for row in unique], near))
        found[unique[similar >= 0]] = unique[similar[similar >= 0]]
    return found


def _numbers(rows: Sequence[int | None]) -> np.ndarray:
    return np.array([-1 if row is None else row for row in rows], np.int64)
