"""The order of the rows of a mixture, as arithmetic on row numbers; no row is read.

The functions of `datasets` that shuffle, concatenate and interleave run on a data set of row numbers, so that a mixture
has the order that they give to the rows themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from align.config.parts import Mixture, Source

_PASS_SEED = 7919
"""The pass number times this is added to the seed of a source's shuffle."""


@dataclass(frozen=True)
class Order:
    """Rows in the order of a mixture. source: index of each row's source. row: its number within the source."""

    source: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, kept: np.ndarray) -> Order:
        return Order(self.source[kept], self.row[kept])

    def first_occurrences(self) -> Order:
        """The order without the repetitions of a row."""
        place = np.unique(self.source.astype(np.int64) << 48 | self.row, return_index=True)[1]
        return self[np.sort(place)]


def chosen_rows(rows: int, limit: int | None, seed: int) -> np.ndarray | None:
    """Sorted numbers of the rows that `limit` keeps; None for all rows."""
    if limit is None or limit >= rows:
        return None
    return np.sort(_numbers(_shuffled(rows, seed).select(range(limit))))


def mixed_order(sizes: Sequence[int], sources: Sequence[Source], mixture: Mixture, seed: int) -> Order:
    """The order of a mixture of sources with `sizes` rows. See `align.config.parts.Mixture`."""
    starts = np.cumsum([0, *sizes])
    parts = [
        _source_order(int(start), size, source, seed)
        for start, size, source in zip(starts, sizes, sources, strict=False)
    ]
    if len(parts) == 1:
        numbers = _numbers(parts[0])
    elif shares := mixture_shares([len(part) for part in parts], sources, mixture):
        numbers = _numbers(
            datasets.interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy=mixture.stop)
        )
    else:
        numbers = _numbers(datasets.concatenate_datasets(parts).shuffle(seed=seed, keep_in_memory=True))
    source = np.searchsorted(starts, numbers, side="right") - 1
    return Order(source.astype(np.int32), numbers - starts[source])


def mixture_shares(sizes: Sequence[int], sources: Sequence[Source], mixture: Mixture) -> list[float] | None:
    """Probability of each source; None if the sources are concatenated."""
    if mixture.temperature is not None:
        weights = [s.weight * size ** (1 / mixture.temperature) for s, size in zip(sources, sizes, strict=True)]
    elif any("weight" in source.model_fields_set for source in sources):
        weights = [source.weight for source in sources]
    else:
        return None
    return [weight / sum(weights) for weight in weights]


def _source_order(start: int, size: int, source: Source, seed: int) -> datasets.Dataset:
    """The rows of one source, numbered from `start`: shuffled, limited, and repeated `epochs` times."""
    rows = size if source.limit is None else min(source.limit, size)
    whole, rest = divmod(max(1, round(source.epochs * rows)), rows)
    passes = [rows] * whole + [rest] * (rest > 0)
    kept = _shuffled(size, seed, start)
    if source.limit is not None:
        kept = kept.select(range(rows))
    repeated = [
        (kept if number == 0 else kept.shuffle(seed + number * _PASS_SEED, keep_in_memory=True), count)
        for number, count in enumerate(passes)
    ]
    taken = [part if count == rows else part.select(range(count)) for part, count in repeated]
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def _shuffled(rows: int, seed: int, start: int = 0) -> datasets.Dataset:
    numbers = datasets.Dataset.from_dict({"row": np.arange(start, start + rows)})
    return numbers.shuffle(seed=seed, keep_in_memory=True)


def _numbers(rows: datasets.Dataset) -> np.ndarray:
    # Through `rows[:]`, a million rows take 500 MB.
    found: np.ndarray = rows.data.column("row").to_numpy()
    return found if rows._indices is None else found[rows._indices.column(0).to_numpy()]
