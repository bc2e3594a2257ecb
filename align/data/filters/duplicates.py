"""Exact and near duplicates of rows.

Two rows are near duplicates if the n-grams that they share are at least a fraction `near` of those of the longer row.
MinHash estimates such a similarity and misses short rows with few changed words; here it is exact. In a common order
of all n-grams, two similar rows must share one of the first `len - ceil(near * len) + 1` n-grams of each (prefix
filtering: Chaudhuri et al. 2006, Bayardo et al. 2007). With rare n-grams first, few rows share one by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from align.data.filters.grams import Hashes

_BUCKETS = 1 << 22
"""Counters of n-grams. Several n-grams may share a counter, which affects only the speed."""


def equal_rows(hashes: Sequence[int] | Hashes) -> list[int | None]:
    """For each row the first earlier row with the same hash, if any. Rows with the hash 0 (no text) equal none."""
    first: dict[int, int] = {}
    found: list[int | None] = []
    for row, value in enumerate(map(int, hashes)):
        earlier = first.setdefault(value, row) if value else row
        found.append(None if earlier == row else earlier)
    return found


def near_duplicates(rows: Sequence[Hashes], near: float) -> list[int | None]:
    """For each row the first earlier row that is kept and similar, if any. Similar rows are not kept.

    rows: sorted distinct n-grams [G] of each row. A row without any is similar to no row.
    near: the shared n-grams / those of the longer row, from which on two rows are similar.
    """
    counts = np.zeros(_BUCKETS, np.uint32)
    for grams in rows:
        np.add.at(counts, _buckets(grams), 1)
    seen: dict[int, list[int]] = {}
    found: list[int | None] = []
    for row, grams in enumerate(rows):
        rare = _prefix(grams, counts, near)
        candidates = sorted({earlier for gram in rare for earlier in seen.get(gram, ())})
        match = next((earlier for earlier in candidates if _similar(rows[earlier], grams, near)), None)
        found.append(match)
        if match is None:
            for gram in rare:
                seen.setdefault(gram, []).append(row)
    return found


def _buckets(grams: Hashes) -> npt.NDArray[np.int64]:
    return (grams & np.uint64(_BUCKETS - 1)).astype(np.int64)


def _prefix(grams: Hashes, counts: npt.NDArray[np.uint32], near: float) -> list[int]:
    """The n-grams of a row's prefix that another row may have, rarest first."""
    if not len(grams):
        return []
    frequency = counts[_buckets(grams)]
    order = np.lexsort((grams, frequency))[: len(grams) - math.ceil(near * len(grams) - 1e-9) + 1]
    return [int(gram) for gram in grams[order[frequency[order] > 1]]]


def _similar(first: Hashes, second: Hashes, near: float) -> bool:
    shorter, longer = sorted((len(first), len(second)))
    if shorter < near * longer - 1e-9:
        return False
    return len(np.intersect1d(first, second, assume_unique=True)) >= near * longer - 1e-9
