"""Chunks of rows: small, picklable, and parsed where they are needed, usually in a worker process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from align.data.files.values import parse_object
from align.data.rows import Row, Unreadable

CHUNK_BYTES = 1 << 20
"""Approximate size of a chunk. A single larger row is a chunk of its own."""
ROW_BYTES = 64
"""Bytes that a record of a CSV file adds to its chunk beside its text."""
MAX_ROW_BYTES = 64 << 20
"""Size of the largest row that is read, which bounds the memory of a reader."""


class Chunk(Protocol):
    """Consecutive rows of one file.

    file: the file, as in messages
    """

    @property
    def file(self) -> str: ...

    def rows(self) -> list[Row]:
        """The rows, parsed. Raises `UserError` with file and line for a row that cannot be read."""

    def where(self, index: int) -> str:
        """File and line of row `index` of the chunk, for messages."""


@dataclass(frozen=True)
class TextChunk:
    """Rows as JSON text, each with the number of its first line."""

    file: str
    texts: tuple[bytes, ...]
    lines: tuple[int, ...]

    def where(self, index: int) -> str:
        return f"{self.file} line {self.lines[index]}"

    def rows(self) -> list[Row]:
        return [parse_object(text, self.where(index)) for index, text in enumerate(self.texts)]


@dataclass(frozen=True)
class RecordChunk:
    """Records of a CSV file: values as text, in the order of `columns`."""

    file: str
    columns: tuple[str, ...]
    records: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]

    def where(self, index: int) -> str:
        return f"{self.file} line {self.lines[index]}"

    def rows(self) -> list[Row]:
        repeated = {name for name in self.columns if self.columns.count(name) > 1}
        rows: list[Row] = []
        for index, record in enumerate(self.records):
            row: Row = dict(zip(self.columns, record, strict=True))
            for name in repeated:
                row[name] = Unreadable(self.where(index), "occurs twice in the first line", "Rename one of them.")
            if not "".join(record).isascii():
                row.update({name: _checked(value, self.where(index)) for name, value in row.items()})
            rows.append(row)
        return rows


def _checked(value: Any, where: str) -> Any:
    """The value, or `Unreadable` for text with bytes that are not UTF-8."""
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        return Unreadable(where, "is not UTF-8", "Save the file as UTF-8.")
    return value


@dataclass(frozen=True)
class ObjectChunk:
    """Rows that are Python objects already, for example of a data set that streams from the hub."""

    file: str
    first: int
    objects: tuple[Row, ...]

    def where(self, index: int) -> str:
        return f"{self.file} row {self.first + index}"

    def rows(self) -> list[Row]:
        return [without_null_keys(row) for row in self.objects]


def without_null_keys(value: Any) -> Any:
    """Copy without the keys of nested objects whose value is None.

    In Arrow every object of a column has the keys of all objects, so None marks the keys that an object lacks. The
    columns of a row stay.
    """
    if isinstance(value, dict):
        return {key: without_null_keys(item) for key, item in value.items() if item is not None}
    return [without_null_keys(item) for item in value] if isinstance(value, list) else value
