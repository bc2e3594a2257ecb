"""Check that offloaded state fits in host memory or on disk, before loading weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from align.config.parallel import Parallel
from align.config.paths import local_path
from align.errors import UserError

OPTIMIZER_BYTES = 16
"""Bytes per trained parameter: float32 weight, gradient and two moments."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}


def require_space(parallel: Parallel, parameters: int, dtype: str, machines: int, trained: int | None = None) -> None:
    """Raise `UserError` if this machine's share of the offloaded state does not fit in its memory or on its disk.

    parameters: number of the whole model's parameters, without adapters.
    trained: number of trained parameters, which are the adapters' under LoRA; None: all of `parameters`.
    """
    offload = parallel.offload
    for device, free, where in (
        ("cpu", available_memory(), "this machine's memory"),
        ("nvme", free_disk(offload.path), f"the disk of {offload.path}"),
    ):
        need = OPTIMIZER_BYTES * (parameters if trained is None else trained) * (offload.optimizer == device)
        need += WEIGHT_BYTES[dtype] * parameters * (offload.parameters == device)
        need //= machines
        if need > free:
            raise UserError(
                f"parallel.offload: {need / 2**30:,.1f} GiB are to be offloaded to {where}, which has "
                f"{free / 2**30:,.1f} GiB free; use more machines, or offload less."
            )


def available_memory() -> int:
    """Linux's estimate of the bytes of memory that are available without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def free_disk(path: str | None) -> int:
    """Free bytes on the disk of a folder; 0 for None."""
    if path is None:
        return 0
    require_folder(path)
    return shutil.disk_usage(local_path(path)).free


def require_folder(path: str) -> None:
    """Raise `UserError` if `path` (parallel.offload.path) is not a writable folder."""
    folder = local_path(path)
    if not folder.exists():
        problem = f"does not exist (paths are relative to {Path.cwd()}); create it"
    elif not folder.is_dir():
        problem = "is a file; set it to a folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = "cannot be written to; fix its permissions, or set another folder"
    else:
        return
    raise UserError(f"parallel.offload.path: {path} {problem}.")
