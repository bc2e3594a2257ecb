"""The folder of a run: stages, manifests, metrics, and a lock that admits one process at a time.

    runs/<run>/recipe.json
    runs/<run>/<stage>/{config.json, rows.json, steps.json, metrics.jsonl, experts.jsonl, checkpoints/, model/,
                          manifest.json}

Does not import torch. Files are written under a temporary name and renamed, so readers never see a partial file. Only
metrics.jsonl, samples.jsonl and experts.jsonl are appended to, one line at a time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from align.errors import UserError

MODEL = "model"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
"""File with the result of an evaluate stage."""
EXPERTS = "experts.jsonl"
"""File with the load of each expert in some of a stage's steps."""
STEPS = "steps.json"
"""File with the number of steps of a stage that is being trained."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; raises `UserError` if the disk is full."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`."""
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
            f"{path}: the disk is full; free some space and continue with --resume (finished stages are kept)."
        )
    return UserError(
        f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); check the path and its permissions."
    )


def is_disk_full(error: BaseException) -> bool:
    """True for an OSError with ENOSPC, and for the exceptions that safetensors and torch raise instead."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or os.strerror(errno.ENOSPC) in str(error)


def remove_folder(path: Path) -> None:
    """Remove a folder, or the link to one; a no-op if there is none."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then rename it to `target`.

    If `write` raises, `target` is unchanged and the temporary folder is removed.
    """
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    try:
        for stale in (partial, old):
            remove_folder(stale)
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
    """Lock the run folder; raises `UserError` with the holder's process id if another process has locked it."""
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
                f"{run_dir}: the run folder is in use by process {holder}; wait until it ends, "
                "or choose another folder with --run-dir."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


class MetricsWriter:
    """Appends to metrics.jsonl, one line per step.

    from_step: the step of a checkpoint; later lines are removed. None: all lines are removed.
    """

    def __init__(self, path: Path, *, from_step: int | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if from_step is None else [line for line in read_jsonl(path) if line["step"] <= from_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.last_step = kept[-1]["step"] if kept else None
        self._file: TextIO = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)
        self._path = path

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise disk_error(self._path, error) from error

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines before the first incomplete one, which a killed process may leave. Empty if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
