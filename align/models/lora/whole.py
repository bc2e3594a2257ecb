"""Whole weights in files, for libraries that cannot read an adapter beside its base."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from align.models.family import load_config
from align.models.lora.stream import merge_adapter
from align.run.adapted import base_of, weights_of
from align.run.folder import MODEL, disk_error

PREFIX, LOCK = ".merged-", "lock"


@contextmanager
def whole(checkpoint: Path) -> Iterator[Path]:
    """A folder with the checkpoint's whole weights.

    If the checkpoint is an adapter beside its base, they are merged into a folder beside the checkpoint, which is
    removed at the end. A folder that a killed process has left is removed at the next call.
    """
    if not weights_of(checkpoint).adapters:
        yield checkpoint
        return
    _remove_abandoned(checkpoint.parent)
    try:
        folder = Path(mkdtemp(dir=checkpoint.parent, prefix=PREFIX))
    except OSError as error:
        raise disk_error(checkpoint.parent, error) from error
    with open(folder / LOCK, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            merge_adapter(base_of(checkpoint), load_config(checkpoint), checkpoint, folder / MODEL)
            yield folder / MODEL
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove merged weights whose process no longer holds their lock."""
    for folder in parent.glob(f"{PREFIX}*"):
        if not (folder / LOCK).is_file():
            continue
        with open(folder / LOCK, encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder, ignore_errors=True)
