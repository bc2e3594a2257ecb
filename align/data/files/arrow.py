"""Read Parquet and Arrow files in chunks. No file is loaded whole.

Import this module only where such a file is read: it loads pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.files.chunk import CHUNK_BYTES, Chunk, without_null_keys
from align.data.rows import Row, Unreadable
from align.errors import UserError

_MOST_ROWS = 10_000
_DAMAGED = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)
_REWRITE = "Write the file again."


@dataclass(frozen=True)
class ArrowChunk:
    """Rows of a Parquet or Arrow file.

    first   number of the first row in the file, from 1
    data    a record batch as an Arrow stream
    broken  (column, problem) of the columns that cannot be read
    """

    file: str
    first: int
    data: bytes
    broken: tuple[tuple[str, str], ...] = ()

    def where(self, index: int) -> str:
        return f"{self.file} row {self.first + index}"

    def rows(self) -> list[Row]:
        table = pa.ipc.open_stream(self.data).read_all()
        columns = {name: self._values(name, table.column(i)) for i, name in enumerate(table.column_names)}
        for name, problem in self.broken:
            columns[name] = [Unreadable(self.where(i), problem, _REWRITE) for i in range(table.num_rows)]
        return [{name: values[i] for name, values in columns.items()} for i in range(table.num_rows)]

    def _values(self, name: str, column: pa.ChunkedArray) -> Sequence[Any]:
        try:
            return [without_null_keys(value) for value in _python(column)]
        except (pa.ArrowException, ValueError, TypeError, OverflowError, ArithmeticError, RecursionError):
            return [self._value(column, index) for index in range(len(column))]

    def _value(self, column: pa.ChunkedArray, index: int) -> Any:
        try:
            return without_null_keys(_python(column.slice(index, 1))[0])
        except (pa.ArrowException, ValueError, TypeError, OverflowError, ArithmeticError, RecursionError) as error:
            return Unreadable(self.where(index), f"cannot be converted ({first_line(error)})", _REWRITE)


def _python(column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = column.to_pylist(maps_as_pydicts="lossy")
    return values


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def arrow_chunk(file: str, first: int, batch: pa.RecordBatch, broken: tuple[tuple[str, str], ...] = ()) -> ArrowChunk:
    """Chunk of a record batch; only the rows of the batch are copied, not its buffers."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return ArrowChunk(file, first, sink.getvalue().to_pybytes(), broken)


def parquet_chunks(file: Path) -> Iterator[Chunk]:
    """Yield the rows of a Parquet file."""
    try:
        with pq.ParquetFile(file, buffer_size=CHUNK_BYTES, pre_buffer=False) as opened:
            facts = opened.metadata
            size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
            rows = _rows_per_chunk(size, facts.num_rows)
            yield from _batches(file, opened.iter_batches(batch_size=rows, use_threads=False))
    except _DAMAGED as error:
        raise _unreadable(file, "Parquet", error) from error


def arrow_chunks(file: Path) -> Iterator[Chunk]:
    """Yield the rows of an Arrow file, in the file format or in the stream format that `datasets` writes."""
    try:
        with pa.memory_map(str(file)) as source:
            yield from _batches(file, _ipc_batches(source))
    except _DAMAGED as error:
        raise _unreadable(file, "Arrow", error) from error


def _ipc_batches(source: Any) -> Iterator[pa.RecordBatch]:
    if bytes(source.read(6)) == b"ARROW1":
        source.seek(0)
        with pa.ipc.open_file(source) as opened:
            for number in range(opened.num_record_batches):
                yield opened.get_batch(number)
        return
    source.seek(0)
    with pa.ipc.open_stream(source) as stream:
        yield from stream


def _batches(file: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[Chunk]:
    first = 1
    for batch in batches:
        batch, broken = _checked(batch)
        step = _rows_per_chunk(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            yield arrow_chunk(str(file), first, part, broken)
            first += part.num_rows


def _checked(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, tuple[tuple[str, str], ...]]:
    """The batch with null for each column whose values are damaged, and (name, problem) of these columns.

    Reading damaged values could crash the process.
    """
    broken = []
    for number, name in enumerate(batch.schema.names):
        try:
            batch.column(number).validate(full=True)
        except _DAMAGED as error:
            broken.append((name, f"is damaged ({first_line(error)})"))
            batch = batch.set_column(number, name, pa.nulls(batch.num_rows))
    return batch, tuple(broken)


def _rows_per_chunk(size: int, rows: int) -> int:
    return max(1, min(_MOST_ROWS, rows, CHUNK_BYTES * rows // max(size, 1)))


def _unreadable(file: Path, kind: str, error: BaseException) -> UserError:
    return UserError(f"{file}: not a readable {kind} file ({first_line(error)}). Write it again.")
