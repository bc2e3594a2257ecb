"""Read a JSON Lines file while another process appends to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHUNK = 2 * 2**20
"""Bytes that one call reads at most. Longer lines are skipped."""
HEAD = 64
"""Bytes at the start of a file that identify it: a new file may reuse the inode of a removed one."""


class Lines(NamedTuple):
    """Result of `Tail.read`.

    rows: the new lines, in order.
    restarted: True if the file was removed or replaced, so that earlier rows no longer count.
    more: True if there may be more lines to read now.
    """

    rows: list[dict[str, Any]]
    restarted: bool
    more: bool


class Tail:
    """Reads the JSON objects that were appended to a file since the last call.

    The file may be missing, may appear later, and may be removed or replaced: a resumed run replaces it. A line counts
    once its newline is written. Lines that are not JSON objects are skipped. No file stays open between calls.
    """

    def __init__(self, path: Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._inode, self._head, self._offset = 0, b"", 0
        self._skipping = False  # in a line that is longer than a chunk

    def read(self) -> Lines:
        """Read at most `CHUNK` bytes."""
        try:
            with open(self.path, "rb") as file:
                restarted = self._detect_replacement(file)
                file.seek(self._offset)
                chunk = file.read(CHUNK)
        except OSError:  # missing or temporarily unreadable
            restarted = self._offset > 0
            self._forget()
            return Lines([], restarted, more=False)
        full = len(chunk) == CHUNK
        end = chunk.rfind(b"\n") + 1
        if full and not end:
            self._offset += CHUNK
            self._skipping = True
            return Lines([], restarted, more=True)
        self._offset += end
        start = chunk.find(b"\n") + 1 if self._skipping else 0
        if end:
            self._skipping = False
        return Lines(list(_objects(chunk[start:end])), restarted, more=full)

    def _detect_replacement(self, file: Any) -> bool:
        """Restart at offset 0 if the file was replaced; returns True if lines of the earlier file had been read."""
        status, head = os.fstat(file.fileno()), file.read(HEAD)
        same = status.st_ino == self._inode and status.st_size >= self._offset and head.startswith(self._head)
        restarted = not same and self._offset > 0
        if not same:
            self._forget()
        self._inode, self._head = status.st_ino, head
        return restarted


def _objects(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row
