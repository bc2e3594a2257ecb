"""Report how far the tokenisation of a source is: rows, share, rate and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from align.config.data_files import TEXT_SUFFIXES
from align.data.files import Chunk, RecordChunk, TextChunk
from align.data.sources import SourceChunk

Show = Callable[[str], None]
"""Shows a line until the next one; an empty line removes it."""
EVERY = 1.0
"""Seconds between two lines."""


def silent(line: str) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Size:
    """Size of a source, if it can be known without reading the source."""

    unit: Literal["rows", "bytes"]
    total: int


def size_of(files: Sequence[Path]) -> Size | None:
    """Bytes of text files, rows of Parquet files; None for compressed text, Arrow files and mixed folders."""
    suffixes = {file.suffix.lower() for file in files}
    if suffixes <= set(TEXT_SUFFIXES):
        return Size("bytes", sum(file.stat().st_size for file in files))
    if suffixes <= {".parquet", ".pq"}:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return Size("rows", sum(pq.read_metadata(file).num_rows for file in files))
        except (pa.ArrowException, OSError):  # reported when the file is read
            return None
    return None


def text_bytes(chunk: Chunk) -> int:
    """Bytes of the file that a chunk of text covers, about; 0 for other chunks."""
    match chunk.chunk if isinstance(chunk, SourceChunk) else chunk:
        case TextChunk(texts=texts):
            return sum(map(len, texts)) + len(texts)
        case RecordChunk(records=records):
            return sum(len(value) + 1 for record in records for value in record)
    return 0


@dataclass
class Progress:
    """Progress of one source. `kept` counts the rows that an earlier start has tokenised."""

    name: str
    size: Size | None
    show: Show
    rows: int = 0
    bytes: int = 0
    kept: tuple[int, int] = (0, 0)
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)

    def keep(self, rows: int, size: int) -> None:
        """Count a shard of an earlier start."""
        self.kept = (self.kept[0] + rows, self.kept[1] + size)
        self.rows, self.bytes = self.rows + rows, self.bytes + size

    def add(self, rows: int, size: int) -> None:
        """Count a finished shard, and show a line unless one was shown just now."""
        self.rows, self.bytes, now = self.rows + rows, self.bytes + size, time.monotonic()
        if now - self.shown >= EVERY:
            self.shown = now
            self.show(self.line(now - self.started))

    def line(self, seconds: float) -> str:
        """The line after `seconds` seconds."""
        rate = (self.rows - self.kept[0]) / max(seconds, 1e-9)
        parts = [f"{self.rows:,} rows", f"{rate:,.0f} rows/s"]
        if self.size is not None and self.size.total:
            place = 0 if self.size.unit == "rows" else 1
            done = min(1.0, (self.rows, self.bytes)[place] / self.size.total)
            begun = self.kept[place] / self.size.total
            left = (1 - done) * seconds / max(done - begun, 1e-9)
            parts = [f"{done:.0%}", *parts, f"{_duration(left)} left"]
        return f"  tokenising {self.name}: {', '.join(parts)}"

    def end(self) -> None:
        """Remove the line."""
        self.show("")


def _duration(seconds: float) -> str:
    if seconds >= 90:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s"
