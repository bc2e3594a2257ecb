"""The folder of a run: stages, manifests, metrics, and the lock that keeps two processes apart.

    runs/<run>/recipe.json
    runs/<run>/<stage>/{config.json, metrics.jsonl, checkpoints/, model/, manifest.json}

Nothing here imports torch. Every file is written under a temporary name and renamed, so a reader sees it whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from align.errors import UserError

MODEL = "model"
MANIFEST = "manifest.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all. A full disk is a `UserError`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in the place of `path`."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, Exception) and (isinstance(error, OSError) or is_disk_full(error)):
            raise disk_error(path, error) from error
        raise


def disk_error(path: Path, error: Exception) -> UserError:
    if is_disk_full(error):
        return UserError(
            f"{path}: the disk is full; free some space and continue with --resume (nothing finished is lost)."
        )
    return UserError(
        f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); check the path and its permissions."
    )


def is_disk_full(error: BaseException) -> bool:
    """True for an OSError, and for what safetensors and torch raise in its place."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or os.strerror(errno.ENOSPC) in str(error)


def remove_folder(path: Path) -> None:
    """Remove a folder, or the link to one; nothing there is fine."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then put it in the place of `target`.

    Whatever `write` raises, `target` stays as it was and nothing half-written is left.
    """
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    try:
        for left_over in (partial, old):
            remove_folder(left_over)
        partial.mkdir(parents=True)
        write(partial)
        if target.is_symlink() or target.exists():
            target.rename(old)
        partial.rename(target)
        remove_folder(old)
    except BaseException as error:
        remove_folder(partial)
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, Exception) and (isinstance(error, OSError) or is_disk_full(error)):
            raise disk_error(target, error) from error
        raise


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder; another process that tries gets a `UserError` with the holder's process id."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed by the with below)
    except OSError as error:
        raise disk_error(run_dir, error) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(
                f"{run_dir}: the run folder is in use by process {holder}; wait for it, "
                "or choose another with --run-dir."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


class MetricsWriter:
    """Appends to metrics.jsonl, one line a step. Opened at a checkpoint's step it drops the lines after it."""

    def __init__(self, path: Path, *, from_step: int | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if from_step is None else [line for line in read_jsonl(path) if line["step"] <= from_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.last_step = kept[-1]["step"] if kept else None
        self._file: TextIO = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)
        self._path = path

    def write(self, step: int, metrics: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise disk_error(self._path, error) from error

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line cut by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
