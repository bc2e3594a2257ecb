"""Whether what is to be offloaded finds room, asked before a weight is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from align.config.parallel import Parallel
from align.errors import UserError

OPTIMIZER_BYTES = 16
"""A trained parameter's float32 weight, gradient and two moments."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}


def require_room(parallel: Parallel, parameters: int, dtype: str, machines: int, trained: int | None = None) -> None:
    """Raise `UserError` where this machine's memory or disk does not hold its part of a model's `parameters`, of which
    `trained` learn (None: all; adapters come on top)."""
    offload = parallel.offload
    for place, free, where in (
        ("cpu", available_memory(), "this machine's memory"),
        ("nvme", free_disk(offload.path), f"the disk of {offload.path}"),
    ):
        need = OPTIMIZER_BYTES * (parameters if trained is None else trained) * (offload.optimizer == place)
        need += WEIGHT_BYTES[dtype] * parameters * (offload.parameters == place)
        need //= machines
        if need > free:
            raise UserError(
                f"parallel.offload: {need / 2**30:,.1f} GiB are to go to {where}, which has {free / 2**30:,.1f} free; "
                "use more machines, or offload less."
            )


def available_memory() -> int:
    """Free memory and what Linux's page cache would give up, in bytes."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def free_disk(path: str | None) -> int:
    if path is None:
        return 0
    require_folder(path)
    return shutil.disk_usage(path).free


def require_folder(path: str) -> None:
    if not os.path.exists(path):
        problem = f"does not exist (paths are relative to {Path.cwd()}); create it"
    elif not os.path.isdir(path):
        problem = "is a file; name a folder"
    elif not os.access(path, os.W_OK | os.X_OK):
        problem = "cannot be written to; mend its permissions, or name another folder"
    else:
        return
    raise UserError(f"parallel.offload.path: {path} {problem}.")
