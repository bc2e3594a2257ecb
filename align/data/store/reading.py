"""The rows of a source as the store reads them: groups of chunks in file order, and what determines the rows."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from align.config.data_files import Listing
from align.config.parts import FileSource, HubSource, PythonDocsSource, Source, StageSource
from align.data.accepted import ACCEPTED, Kind
from align.data.files import Chunk
from align.data.rows import Row
from align.data.sources import SourceChunk, adapter_of, describe_source, load_hub, source_chunks, stage_file
from align.run.cache import content_hash

CHUNKS = 4
"""Chunks of a shard. A chunk of a text file has about a megabyte."""


@dataclass(frozen=True)
class ChunkGroup:
    """Consecutive chunks of a source, which become one shard."""

    chunks: tuple[Chunk, ...]

    def rows(self) -> list[Row]:
        """The rows, parsed. Raises `UserError` with file and line for a row that cannot be read."""
        return [row for chunk in self.chunks for row in chunk.rows()]

    def rows_and_names(self) -> tuple[list[Row], Counter[str]]:
        """(the rows, {`setting: name`: rows that have the column or role}); see `Adapter.names`."""
        rows, names = list[Row](), Counter[str]()
        for chunk in self.chunks:
            if isinstance(chunk, SourceChunk):
                more, found = chunk.rows_and_names()
                rows += more
                names.update(found)
            else:
                rows += chunk.rows()
        return rows, names

    def where(self, index: int) -> str:
        """File and line of row `index` of the group."""
        for chunk in self.chunks:
            count = len(chunk.rows())
            if index < count:
                return chunk.where(index)
            index -= count
        raise IndexError(index)


@dataclass(frozen=True)
class Reading:
    """Access to the rows of a source.

    name      short name for messages
    identity  everything that determines the rows, as JSON: content hashes and settings of the source
    open      yields the groups of chunks from the start; raises `UserError` for a source that cannot be used
    files     its data files; none for a source without files
    others    files beside them that are not read
    names     settings that name a column or role of the data; see `Adapter.names`
    """

    name: str
    identity: Any
    open: Callable[[], Iterator[ChunkGroup]]
    files: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise `UserError` unless the source has rows that the stage can use."""
        next(self.open())


def open_source(source: Source, kind: Kind, stage_dirs: Mapping[str, Path], cache: Path) -> Reading:
    """Access to the rows of the source. Raises `UserError` for a source that does not exist."""

    def groups() -> Iterator[ChunkGroup]:
        found = source_chunks(source, stage_dirs=stage_dirs, accepted=ACCEPTED[kind])
        while group := tuple(islice(found, CHUNKS)):
            yield ChunkGroup(group)

    listing, adapter = _listing(source, stage_dirs), adapter_of(source)
    identity = [_content(source, listing.files, cache), asdict(adapter)]
    return Reading(describe_source(source), identity, groups, listing.files, listing.others, tuple(adapter.names()))


def _listing(source: Source, stage_dirs: Mapping[str, Path]) -> Listing:
    match source:
        case FileSource():
            return source.files()
        case StageSource():
            return Listing((stage_file(source, stage_dirs),))
    return Listing(())


def _content(source: Source, files: Sequence[Path], cache: Path) -> Any:
    match source:
        case PythonDocsSource():
            return ["python_docs", platform.python_version(), source.view, source.split, source.max_answer_chars]
        case HubSource():
            rows: Any = load_hub(source.model_copy(update={"streaming": False}))
            return ["hub", rows._fingerprint]
    return [[file.name, content_hash(file, cache)] for file in files]
