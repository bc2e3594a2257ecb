"""The cache folder of this machine: its place, its locks, atomic writes, and hashes of files.

All of its content can be recreated. Does not import torch or numpy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from align.config.paths import local_path
from align.errors import UserError

VARIABLE = "ALIGN_CACHE"
DEFAULT = "~/.cache/align"
POLL = 0.2
"""Seconds between two attempts to get a lock."""
CLOCK_NS = 10**8
"""Assumed resolution of the file system's clock, 0.1 s."""
REMEMBERED = 2**20
"""Minimum size in bytes of files whose hash is kept. Reading a smaller file is as fast as reading a kept hash."""


def cache_folder(setting: str | None) -> Path:
    """Folder of the tokenised rows: `data.cache`, otherwise the variable ALIGN_CACHE, otherwise ~/.cache/align."""
    return local_path(setting or os.environ.get(VARIABLE) or DEFAULT) / "data"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of the file system (no space, no permission) into a `UserError` that names the setting."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache: cannot write to {folder} ({error.strerror or error}). Set `data.cache`, or the environment "
            f"variable {VARIABLE}, to a folder on a disk with free space."
        ) from error


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of `path`; wait for another process of this machine that holds it, and call `waiting` meanwhile.

    The operating system releases the lock of a process that is killed.
    """
    with open(path.with_name(path.name + ".lock"), "w") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            waiting()
            time.sleep(POLL)
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that no reader sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Content of a JSON file; None if the file is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def hashed(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- hashes of files --------------------------------------------------------------------------------------


def content_hash(file: Path, cache: Path) -> str:
    """SHA-256 of a file's content.

    A large file is read only if its size, times or inode have changed since it was last hashed.
    """
    before = _identity(file)
    record = cache / "files" / f"{hashed(str(file.resolve()))}.json"
    known = read_json(record) if before[0] >= REMEMBERED else None
    if isinstance(known, dict) and known.get("identity") == before:
        return str(known["sha256"])
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    # A change within the resolution of the file system's clock leaves the times unchanged, so the hash of a file that
    # has just been written is not kept.
    settled = time.time_ns() - file.stat().st_ctime_ns > CLOCK_NS
    if before[0] >= REMEMBERED and settled and _identity(file) == before:
        with suppress(OSError):  # without the record, the file is read again
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps({"path": str(file), "identity": before, "sha256": digest}).encode())
    return digest


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
