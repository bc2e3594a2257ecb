"""Read one source of a recipe in chunks, each row in its own shape.

A source is checked before a model is loaded, so that a bad line is reported early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.parts import FileSource, HubSource, PythonDocsSource, RowSource, Source, StageSource
from align.data.files import Chunk, ObjectChunk, chunks, file_chunks
from align.data.python_docs import python_docs_rows
from align.data.rows import Row, SystemPrompt
from align.data.shapes import TEMPLATE_COLUMNS, Shape, no_shape, shape_of
from align.data.shapes.adapt import FORMATS, Adapter
from align.data.shapes.recognise import NEEDS, READS, STANDARD_COLUMNS, needs
from align.errors import UserError

if TYPE_CHECKING:
    import datasets

LOOKED_AT = 20
"""Files of a source whose first rows are checked."""


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

    def rows_and_names(self) -> tuple[list[Row], Counter[str]]:
        """(the rows, {`setting: name`: rows that have the column or role}); see `Adapter.names`."""
        rows = self.chunk.rows()
        return [self.adapter(row) for row in rows], Counter(name for row in rows for name in self.adapter.names_in(row))


def source_chunks(
    source: Source,
    *,
    stage_dirs: Mapping[str, Path] | None = None,
    accepted: Sequence[Shape] | None = None,
) -> Iterator[Chunk]:
    """Yield the rows of a source in order.

    accepted: shapes that the stage can use. Raises `UserError` if the source is unreadable or has no rows, if `columns`
    refers to a column that the source lacks, or if no row has an accepted shape. Both are judged by the first rows of
    its first `LOOKED_AT` files.
    """
    adapter = adapter_of(source)
    found = _unchecked_chunks(source, stage_dirs or {})
    first = next(found, None)
    if first is None:
        raise UserError(f"{describe_source(source)}: the source has no rows. Set another source.")
    _check(chain([first], _first_chunks(source)), adapter, accepted, describe_source(source))
    for chunk in chain([first], found):
        yield SourceChunk(chunk, adapter) if adapter != Adapter() else chunk


def check_first_rows(source: Source, accepted: Sequence[Shape]) -> None:
    """Raise `UserError` as `source_chunks` does. Only first chunks are read."""
    next(source_chunks(source, accepted=accepted))


def _first_chunks(source: Source) -> Iterator[Chunk]:
    """The first chunk of each further file that is looked at."""
    if isinstance(source, FileSource):
        for file in source.files().files[1:LOOKED_AT]:
            yield from islice(file_chunks(file), 1)


def adapter_of(source: Source) -> Adapter:
    """Changes that the settings of a source make to its rows."""
    if isinstance(source, RowSource):
        text, replace = source.system_prompt, source.replace_system_prompt
        system = None if text is None else SystemPrompt(text, replace)
        return Adapter(source.columns, source.format, source.roles, tuple(source.ignore), system)
    return Adapter()


def _check(first_chunks: Iterator[Chunk], adapter: Adapter, accepted: Sequence[Shape] | None, name: str) -> None:
    if accepted is not None and "prompt" not in accepted:  # a reward function may read any column of a prompt's row
        _require_known_columns(adapter, accepted, name)
    before: set[str] = set()
    after: set[str] = set()
    missing, usable = set(adapter.columns.values()), accepted is None
    of_format = adapter.format is None
    for chunk in first_chunks:
        for row in chunk.rows():
            before.update(row)
            adapted = adapter(row)
            after.update(adapted)
            usable = usable or shape_of(adapted, accepted or ()) is not None
            of_format = of_format or shape_of(adapted, (FORMATS[str(adapter.format)],)) is not None
        missing -= before
        if usable and not missing:
            return
    if missing:
        raise UserError(
            f"{name}: `columns` refers to {', '.join(sorted(missing))}, but the source's columns are "
            f"{', '.join(sorted(before))}. Correct `columns`."
        )
    _require_known_columns(adapter, accepted or (), name, only_near=True)
    if not of_format:
        needed = NEEDS[FORMATS[str(adapter.format)]]
        raise UserError(
            f"{name}: `format: {adapter.format}` needs {needed}, but the columns are {', '.join(sorted(before))}. "
            "Correct `format`, or rename the columns with `columns`."
        )
    if adapter.format is not None:
        raise UserError(
            f"{name}: `format: {adapter.format}` is a shape that this stage does not accept; it needs "
            f"{needs(accepted or ())}. The columns are {', '.join(sorted(before))}. Correct or remove `format`."
        )
    raise no_shape(after, accepted or (), name)


def _require_known_columns(adapter: Adapter, accepted: Sequence[Shape], name: str, *, only_near: bool = False) -> None:
    """Raise `UserError` for a key of `columns` that is not a standard column.

    only_near: ignore keys that resemble none.
    """
    read = sorted({*TEMPLATE_COLUMNS, *(column for shape in accepted for column in READS[shape])})
    for column in adapter.columns:
        near = get_close_matches(column, read, 1, 0.7)
        if column not in STANDARD_COLUMNS and (near or not only_near):
            advice = f"Did you mean `{near[0]}`?" if near else f"Use one of {', '.join(read)}."
            raise UserError(f"{name}: `columns` sets `{column}`, which is not a standard column. {advice}")


def _unchecked_chunks(source: Source, stage_dirs: Mapping[str, Path]) -> Iterator[Chunk]:
    match source:
        case FileSource():
            return (chunk for file in source.files().files for chunk in file_chunks(file))
        case HubSource():
            return _hub_chunks(source)
        case PythonDocsSource():
            rows = python_docs_rows(source.view, source.split, source.max_answer_chars)
            return iter([ObjectChunk("python_docs", 1, tuple(rows))] if rows else [])
        case StageSource():
            return chunks(stage_file(source, stage_dirs))


def stage_file(source: StageSource, stage_dirs: Mapping[str, Path]) -> Path:
    """File of the rows of an earlier stage. Raises `UserError` if it does not exist."""
    if source.stage not in stage_dirs:
        known = ", ".join(sorted(stage_dirs)) or "none"
        raise UserError(f"stage '{source.stage}': it has no rows yet; the stages with rows are {known}.")
    path = Path(stage_dirs[source.stage]) / "data" / f"{source.split}.jsonl"
    if not path.is_file():
        raise UserError(f"stage '{source.stage}': {path} does not exist; run that stage first.")
    return path


def load_hub(source: HubSource) -> datasets.Dataset | datasets.IterableDataset:
    """The data set of a `hub` source. Raises `UserError` if it cannot be loaded."""
    import datasets

    try:
        return datasets.load_dataset(source.id, source.name, split=source.split, streaming=source.streaming)
    except (OSError, ValueError, RuntimeError) as error:  # not found, offline, unknown configuration or split
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"data set '{source.id}', split '{source.split}': cannot be loaded from the Hugging Face hub: {reason}. "
            "Check the id and the network, or download the data set and use a `file` source."
        ) from error


def _hub_chunks(source: HubSource) -> Iterator[Chunk]:
    from align.data.files.arrow import arrow_chunk  # loads pyarrow

    rows: Any = load_hub(source)
    first = 1
    if source.streaming:
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
