"""Read the sources of a recipe, each row in its own shape, and mix them.

A source is read and checked before a model is loaded, so that a bad line is reported early.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypedDict, TypeVar

import datasets

from align.config.parts import FileSource, HubSource, PythonDocsSource, RowSource, Source, StageSource
from align.data.files import Chunk, ObjectChunk, chunks
from align.data.files.arrow import arrow_chunk
from align.data.python_docs import python_docs_rows
from align.data.rows import Row
from align.data.shapes import Shape, no_shape, shape_of
from align.data.shapes.adapt import Adapter
from align.errors import UserError

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


# --- one source -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceChunk:
    """A chunk whose rows are adapted by the settings of their source."""

    chunk: Chunk
    adapter: Adapter

    @property
    def file(self) -> str:
        return self.chunk.file

    def where(self, index: int) -> str:
        """File and line of row `index`."""
        return self.chunk.where(index)

    def rows(self) -> list[Row]:
        """The rows with the standard names of columns and roles."""
        return [self.adapter(row) for row in self.chunk.rows()]


def source_chunks(
    source: Source,
    *,
    stage_dirs: Mapping[str, Path] | None = None,
    accepted: Sequence[Shape] | None = None,
) -> Iterator[Chunk]:
    """Yield the rows of a source in the order in which it has them.

    accepted: shapes that the stage can use. Raises `UserError` if the source is unreadable or has no rows, if `columns`
    refers to a column that no row of the first chunk has, or if none of these rows has an accepted shape.
    """
    adapter = Adapter()
    if isinstance(source, RowSource):
        adapter = Adapter(source.columns, source.format, source.roles, tuple(source.ignore))
    found = _unchecked_chunks(source, stage_dirs or {})
    first = next(found, None)
    if first is None:
        raise UserError(f"{describe_source(source)}: the source has no rows. Set another source.")
    _check(first, adapter, accepted, describe_source(source))
    for chunk in chain([first], found):
        yield SourceChunk(chunk, adapter) if adapter != Adapter() else chunk


def _check(first: Chunk, adapter: Adapter, accepted: Sequence[Shape] | None, name: str) -> None:
    raw = first.rows()
    columns = {column for row in raw for column in row}
    if missing := sorted(set(adapter.columns.values()) - columns):
        raise UserError(
            f"{name}: `columns` refers to {', '.join(missing)}, but the source's columns are "
            f"{', '.join(sorted(columns))}. Correct `columns`."
        )
    rows = [adapter(row) for row in raw]
    if accepted is not None and all(shape_of(row, accepted) is None for row in rows):
        raise no_shape({column for row in rows for column in row}, accepted, name)


def _unchecked_chunks(source: Source, stage_dirs: Mapping[str, Path]) -> Iterator[Chunk]:
    match source:
        case FileSource():
            return chunks(source.path, source.splits())
        case HubSource():
            return _hub_chunks(source)
        case PythonDocsSource():
            rows = python_docs_rows(source.view, source.split, source.max_answer_chars)
            return iter([ObjectChunk("python_docs", 1, tuple(rows))] if rows else [])
        case StageSource():
            return chunks(_stage_file(source, stage_dirs))


def _stage_file(source: StageSource, stage_dirs: Mapping[str, Path]) -> Path:
    if source.stage not in stage_dirs:
        known = ", ".join(sorted(stage_dirs)) or "none"
        raise UserError(f"stage '{source.stage}': it has no rows yet; the stages with rows are {known}.")
    path = Path(stage_dirs[source.stage]) / "data" / f"{source.split}.jsonl"
    if not path.is_file():
        raise UserError(f"stage '{source.stage}': {path} does not exist; run that stage first.")
    return path


def _hub_chunks(source: HubSource) -> Iterator[Chunk]:
    try:
        rows = datasets.load_dataset(source.id, source.name, split=source.split, streaming=source.streaming)
    except (OSError, ValueError, RuntimeError) as error:  # not found, offline, unknown configuration or split
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"data set '{source.id}', split '{source.split}': cannot be loaded from the Hugging Face hub: {reason}. "
            "Check the id and the network, or download the data set and use a `file` source."
        ) from error
    first = 1
    if isinstance(rows, datasets.IterableDataset):
        for batch in rows.batch(256):
            columns = list(batch)
            values = zip(*batch.values())
            part = tuple(dict(zip(columns, row)) for row in values)
            yield ObjectChunk(source.id, first, part)
            first += len(part)
        return
    for table in rows.with_format("arrow").iter(256):
        for batch in table.combine_chunks().to_batches():
            yield arrow_chunk(source.id, first, batch)
            first += batch.num_rows


def describe_source(source: Source) -> str:
    """Short name of a source for messages: its path, hub id or kind."""
    match source:
        case FileSource():
            return source.path
        case HubSource():
            return source.id
        case PythonDocsSource():
            return f"python_docs ({source.view}, {source.split})"
        case StageSource():
            return f"stage {source.stage} ({source.split})"


# --- mixtures ---------------------------------------------------------------------------------------------


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
