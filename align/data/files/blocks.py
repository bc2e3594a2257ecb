"""Bytes of a text file as UTF-8 blocks: decompressed, transcoded from UTF-16 and UTF-32, without a byte order mark.

The compression is recognised by the content, not by the file's name.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import IO, Any

from align.data.files.chunk import CHUNK_BYTES
from align.errors import UserError

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ": "xz"}
_MARKS = (  # UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF8, ""),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)


def utf8_blocks(file: Path) -> Iterator[bytes]:
    """Yield the text of a file as UTF-8, in blocks of at most about `CHUNK_BYTES`.

    A block may end inside a character. Bytes that are not UTF-8 are passed on unless the file has the mark of another
    encoding. Raises `UserError` for damaged compressed data, with the last line that could be read.
    """
    raw, decoder = _raw_blocks(file), None
    first = next(raw, b"")
    for mark, encoding in _MARKS:
        if first.startswith(mark):
            if encoding:
                decoder = codecs.getincrementaldecoder(encoding)()
            else:
                first = first[len(mark) :]
            break
    if decoder is None:
        yield first
        yield from raw
        return
    line = 1
    for block in chain([first], raw, [b""]):
        try:
            text = decoder.decode(block, final=not block)
            line += text.count("\n")
            yield text.encode()
        except UnicodeError:
            raise UserError(f"{file} line {line}: not valid UTF-16 or UTF-32. Save the file as UTF-8.") from None


def _raw_blocks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as raw:
            head = raw.read(8)
            raw.seek(0)
            kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
            if kind is None:
                while block := raw.read(CHUNK_BYTES):
                    yield block
                return
            with closing(_decompressed(raw, kind)) as stream:
                yield from _decompressed_blocks(file, stream)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}). Check the file.") from error


def _decompressed(raw: IO[bytes], kind: str) -> Any:
    match kind:
        case "gzip":
            return gzip.GzipFile(fileobj=raw)
        case "bz2":
            return bz2.BZ2File(raw)
        case "xz":
            return lzma.LZMAFile(raw)
        case _:
            import pyarrow as pa

            return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


def _decompressed_blocks(file: Path, stream: Any) -> Iterator[bytes]:
    line = 1
    while True:
        try:
            block = stream.read(CHUNK_BYTES)
        except _DAMAGED:
            raise UserError(
                f"{file} line {line}: the compressed data is damaged or truncated. Copy the file again."
            ) from None
        if not block:
            return
        line += block.count(b"\n")
        yield block
