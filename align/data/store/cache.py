"""The cache folder of tokenised rows: its place, its locks, hashes of source files, and removal of old entries."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from align.config.paths import local_path
from align.errors import UserError

VARIABLE = "ALIGN_CACHE"
DEFAULT = "~/.cache/align"
UNUSED_DAYS = 30
"""Entries that no run has opened for this long are removed when another entry is built."""
CLOCK_NS = 10**8
"""Assumed resolution of the file system's clock, 0.1 s."""
_USED = "used"


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
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`; wait for another process of this machine that holds it.

    The operating system releases the lock of a process that is killed.
    """
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that no reader sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an array under another name and rename it."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomically(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """Content of a JSON file; None if the file is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def hashed(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- hashes of source files -------------------------------------------------------------------------------


def content_hash(file: Path, cache: Path) -> str:
    """SHA-256 of a file's content. It is read only if its size, times or inode differ from those of the last hash."""
    before = _identity(file)
    record = cache / "files" / f"{hashed(str(file.resolve()))}.json"
    known = read_json(record)
    if isinstance(known, dict) and known.get("identity") == before:
        return str(known["sha256"])
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    # A change within the resolution of the file system's clock leaves the times as they are, so the hash of a file that
    # has just been written is not kept.
    settled = time.time_ns() - file.stat().st_ctime_ns > CLOCK_NS
    if settled and _identity(file) == before:
        with writing(cache):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps({"path": str(file), "identity": before, "sha256": digest}).encode())
    return digest


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


# --- old entries ------------------------------------------------------------------------------------------


def mark_used(entry: Path) -> None:
    """Note that a run opens the entry now. A cache that is only readable is used without the note."""
    try:
        (entry / _USED).touch()
    except OSError:
        return


def remove_unused(entries: Path, *, keep: Path, days: float = UNUSED_DAYS) -> None:
    """Remove the entries that were last opened more than `days` ago, except `keep`.

    A process that still maps a removed entry keeps its data.
    """
    oldest = time.time() - days * 86400
    for entry in entries.iterdir() if entries.is_dir() else ():
        if entry == keep or not entry.is_dir():
            continue
        try:
            used = max((entry / name).stat().st_mtime for name in (_USED, ".") if (entry / name).exists())
        except (OSError, ValueError):
            continue
        if used < oldest:
            shutil.rmtree(entry, ignore_errors=True)
