"""Read rows from files in bounded memory: JSON Lines, JSON arrays, CSV, TSV, Parquet, Arrow.

`chunks` yields small picklable chunks of a path; `chunk.rows()` parses one, usually in a worker process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from align.config.data_files import list_files, suffix_of
from align.data.files.chunk import CHUNK_BYTES, MAX_ROW_BYTES, Chunk, ObjectChunk, RecordChunk, TextChunk
from align.data.files.text import csv_chunks, json_chunks
from align.data.rows import Row, Unreadable

__all__ = [
    "CHUNK_BYTES",
    "MAX_ROW_BYTES",
    "Chunk",
    "ObjectChunk",
    "RecordChunk",
    "Row",
    "TextChunk",
    "Unreadable",
    "chunks",
    "file_chunks",
]


def chunks(path: str | Path, splits: Sequence[str] = ()) -> Iterator[Chunk]:
    """Yield the rows of all data files of a path, in order. See `align.config.data_files.list_files` for
    paths and splits."""
    for file in list_files(path, splits).files:
        yield from file_chunks(file)


def file_chunks(file: Path) -> Iterator[Chunk]:
    """Yield the rows of one file, whose suffix tells its format. Raises `UserError` if it cannot be read."""
    match suffix_of(file):
        case ".csv":
            yield from csv_chunks(file, tabs=False)
        case ".tsv":
            yield from csv_chunks(file, tabs=True)
        case ".parquet" | ".pq":
            from align.data.files.arrow import parquet_chunks

            yield from parquet_chunks(file)
        case ".arrow" | ".feather":
            from align.data.files.arrow import arrow_chunks

            yield from arrow_chunks(file)
        case suffix:
            yield from json_chunks(file, lines_only=suffix != ".json")
