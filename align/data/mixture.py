"""Read the rows of a mixture into memory, or stream them, without tokenising them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

import datasets

from align.config.parts import RowSource, Source
from align.data.rows import Row
from align.data.shapes import Shape
from align.data.sources import source_chunks

SHUFFLE_BUFFER = 10_000
"""Rows in the shuffle buffer of a streaming source."""
_ROW = "row"
Part = TypeVar("Part", datasets.Dataset, datasets.IterableDataset)


class Options(TypedDict):
    """Arguments of `source_chunks` beside the source."""

    stage_dirs: Mapping[str, Path] | None
    accepted: Sequence[Shape] | None


class StreamedRows:
    """Rows of a mixture that are read anew by each iteration."""

    def __init__(self, entries: datasets.IterableDataset):
        self._entries = entries

    def __iter__(self) -> Iterator[Row]:
        return (pickle.loads(entry[_ROW]) for entry in self._entries)


def load_rows(
    sources: Sequence[Source],
    *,
    seed: int,
    stage_dirs: Mapping[str, Path] | None = None,
    accepted: Sequence[Shape] | None = None,
) -> list[Row] | StreamedRows:
    """The mixture of `sources`, shuffled with `seed`; a list unless every source streams.

    `limit` applies after the source is shuffled. If no source sets a weight, sources are concatenated and each row
    occurs once. If any source sets a weight, rows are drawn with probabilities proportional to the weights (default 1)
    until one source is exhausted. The shares are then exact in expectation and no row is repeated, but rows of the
    other sources may be unused.

    accepted: shapes that the stage can use; see `source_chunks`.
    """
    options: Options = {"stage_dirs": stage_dirs, "accepted": accepted}
    if all(isinstance(source, RowSource) and source.streaming for source in sources):
        for source in sources:  # an error in a source is raised here
            next(source_chunks(source, **options))
        streams = [_stream(source, seed, options) for source in sources if isinstance(source, RowSource)]
        return StreamedRows(_mixed(sources, streams, seed))
    rows: list[Row] = []
    parts = []
    for source in sources:
        start = len(rows)
        if isinstance(source, RowSource) and source.streaming:
            rows += StreamedRows(_stream(source, seed, options))
            parts.append(_numbers(range(start, len(rows))))
            continue
        rows += (row for chunk in source_chunks(source, **options) for row in chunk.rows())
        shuffled = _shuffled(_numbers(range(start, len(rows))), seed)
        parts.append(shuffled if source.limit is None else shuffled.select(range(min(source.limit, len(shuffled)))))
    return [rows[number] for number in _mixed(sources, parts, seed)["number"]]


def _numbers(numbers: range) -> datasets.Dataset:
    """Row numbers as a data set, so that `datasets` decides the order and the rows keep their types."""
    return datasets.Dataset.from_dict({"number": numbers})


def _stream(source: RowSource, seed: int, options: Options) -> datasets.IterableDataset:
    """The rows of a streaming source, shuffled in a buffer. Each row is pickled: `datasets` would unify the types."""
    rows = datasets.IterableDataset.from_generator(_pickled, gen_kwargs={"source": source, "options": options})
    rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return rows if source.limit is None else rows.take(source.limit)


def _pickled(source: Source, options: Options) -> Iterator[dict[str, bytes]]:
    for chunk in source_chunks(source, **options):
        for row in chunk.rows():
            yield {_ROW: pickle.dumps(row)}


def _mixed(sources: Sequence[Source], parts: list[Part], seed: int) -> Part:
    """The mixture of the sources' rows or row numbers."""
    if len(parts) == 1:
        return parts[0]
    if any("weight" in source.model_fields_set for source in sources):
        total = sum(source.weight for source in sources)
        shares = [source.weight / total for source in sources]
        return datasets.interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    return _shuffled(datasets.concatenate_datasets(parts), seed)


def _shuffled(rows: Part, seed: int) -> Part:
    if isinstance(rows, datasets.IterableDataset):
        return rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return rows.shuffle(seed=seed, keep_in_memory=True)
