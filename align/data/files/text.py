"""Read JSON Lines, JSON arrays and CSV files in chunks."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from align.data.files.blocks import utf8_blocks
from align.data.files.chunk import CHUNK_BYTES, MAX_ROW_BYTES, ROW_BYTES, Chunk, RecordChunk, TextChunk
from align.data.files.values import skip_space, value_end
from align.errors import UserError

Piece = tuple[bytes, int]
"""(text of a row, number of its first line)."""


def json_chunks(file: Path, *, lines_only: bool) -> Iterator[Chunk]:
    """Yield the rows of a file with JSON objects.

    A file that begins with `[` is an array. Otherwise each line is a row. If `lines_only` is False, and the first line
    is not a whole object, the rows are objects one after another, each over several lines.
    """
    blocks = utf8_blocks(file)
    head = _head(blocks)
    first = head[skip_space(head, 0) :].split(b"\n", 1)[0].rstrip()
    if first.startswith(b"["):
        yield from _chunks(file, _values(file, chain([head], blocks), array=True))
    elif lines_only or not first.startswith(b"{") or value_end(first, 0) is not None:
        lines = _lines(file, chain([head], blocks))
        yield from _chunks(file, ((line, number) for line, number in lines if line and not line.isspace()))
    else:
        yield from _chunks(file, _values(file, chain([head], blocks), array=False))


def _head(blocks: Iterator[bytes]) -> bytes:
    """The beginning of the file, with its first line that is not blank, but at most about two blocks."""
    head = b""
    while len(head) < CHUNK_BYTES:
        block = next(blocks, None)
        if block is None:
            break
        head += block
        if b"\n" in head.lstrip():
            break
    return head


def _chunks(file: Path, pieces: Iterator[Piece]) -> Iterator[Chunk]:
    texts: list[bytes] = []
    lines: list[int] = []
    size = 0
    for text, line in pieces:
        if texts and size + len(text) > CHUNK_BYTES:
            yield TextChunk(str(file), tuple(texts), tuple(lines))
            texts, lines, size = [], [], 0
        texts.append(text)
        lines.append(line)
        size += len(text)
    if texts:
        yield TextChunk(str(file), tuple(texts), tuple(lines))


def _too_large(file: Path, line: int) -> UserError:
    size = MAX_ROW_BYTES >> 20
    return UserError(f"{file} line {line}: a row of more than {size} MiB. Split the row, or remove it.")


def _lines(file: Path, blocks: Iterator[bytes]) -> Iterator[Piece]:
    """All lines, without the line feeds."""
    number, begun, size = 0, list[bytes](), 0
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            number += 1
            yield b"".join([*begun, line]), number
            begun, size = [], 0
        begun.append(rest)
        size += len(rest)
        if size > MAX_ROW_BYTES:
            raise _too_large(file, number + 1)
    if line := b"".join(begun):
        yield line, number + 1


def _values(file: Path, blocks: Iterator[bytes], *, array: bool) -> Iterator[Piece]:
    """JSON values one after another: the elements of an array, or objects without separators."""
    buffer, at, line, ended = b"", 0, 1, False

    def advance(to: int) -> None:
        nonlocal at, line
        line += buffer.count(b"\n", at, to)
        at = to

    def more() -> None:
        """Read until the rest of the buffer is twice as long, so that a long value is scanned few times."""
        nonlocal buffer, at, ended
        parts, size = [buffer[at:]], len(buffer) - at
        wanted = max(2 * size, CHUNK_BYTES)
        if size > MAX_ROW_BYTES:
            raise _too_large(file, line)
        while size < wanted and not ended:
            block = next(blocks, None)
            ended = block is None
            parts.append(block or b"")
            size += len(parts[-1])
        buffer, at = b"".join(parts), 0

    def next_byte() -> bytes:
        while True:
            advance(skip_space(buffer, at))
            if at < len(buffer) or ended:
                return buffer[at : at + 1]
            more()

    def wrong(problem: str) -> UserError:
        return UserError(f"{file} line {line}: not valid JSON ({problem}). Correct the file.")

    if array:
        next_byte()
        advance(at + 1)
        if next_byte() == b"]":
            advance(at + 1)
            array = False
    while (mark := next_byte()) or array:
        if not mark:
            raise wrong("the array has no end")
        if mark in (b",", b"]", b"}", b":"):
            raise wrong(f"Expecting value, found '{mark.decode()}'")
        while (end := value_end(buffer, at)) is None and not ended:
            more()
        if end is None:
            if array or mark in (b"{", b"[", b'"'):
                raise wrong("the file ends inside a value")
            end = len(buffer)
        yield buffer[at:end], line
        advance(end)
        if array:
            mark = next_byte()
            if mark not in (b",", b"]"):
                raise wrong("Expecting ',' or ']' after an element" if mark else "the array has no end")
            advance(at + 1)
            if mark == b"]":
                if next_byte():
                    raise wrong("text after the array")
                return


# --- CSV --------------------------------------------------------------------------------------------------


def csv_chunks(file: Path, *, tabs: bool) -> Iterator[Chunk]:
    """Yield the records of a CSV or TSV file, whose first line names the columns. Every value is text.

    The delimiter of a CSV file is the comma, or `;`, tab or `|` if its first line has no comma.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = (text.decode("utf-8", "surrogateescape") + "\n" for text, _ in _lines(file, utf8_blocks(file)))
    header = next(lines, "")
    delimiter = "\t" if tabs else next((mark for mark in ",;\t|" if mark in header), ",")
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    columns: tuple[str, ...] | None = None
    records: list[tuple[str, ...]] = []
    numbers: list[int] = []
    size, line = 0, 1
    while True:
        try:
            record = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            problem = str(error).partition(" - ")[0]
            raise UserError(f"{file} line {reader.line_num}: not valid CSV ({problem}). Correct the line.") from None
        begun, line = line, reader.line_num + 1
        if not record:
            continue
        if columns is None:
            columns = tuple(name.strip() or f"column {number}" for number, name in enumerate(record, start=1))
            continue
        if len(record) != len(columns):
            raise UserError(
                f"{file} line {begun}: {len(record)} values, but the first line names {len(columns)} columns. "
                "Correct the line."
            )
        records.append(tuple(record))
        numbers.append(begun)
        size += sum(map(len, record)) + ROW_BYTES
        if size > CHUNK_BYTES:
            yield RecordChunk(str(file), columns, tuple(records), tuple(numbers))
            records, numbers, size = [], [], 0
    if records and columns is not None:
        yield RecordChunk(str(file), columns, tuple(records), tuple(numbers))
