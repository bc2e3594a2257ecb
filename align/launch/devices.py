"""The GPU of a process among those that it sees. Does not import torch."""

from __future__ import annotations

import os

from align.errors import UserError
from align.launch.processes import whole_number

INDEX = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
"""Variables that DeepSpeed, accelerate and torch take for the index of the process's GPU."""


def own_gpu(visible: int) -> int:
    """Index of this process's GPU among the `visible` ones.

    LOCAL_RANK counts the ranks of a machine, so it is the index if each rank sees all GPUs. A launcher may also show
    each rank its own GPU only (Slurm does so with --gpus-per-task); that one has the index 0.
    """
    local = whole_number(os.environ, "LOCAL_RANK", "0")
    if visible == 1:
        return 0
    if local >= visible:
        raise UserError(
            f"LOCAL_RANK is {local}, but this process sees {visible} GPUs; start at most {visible} processes on this "
            "machine, or make all of its GPUs visible."
        )
    return local


def set_gpu_index(index: int) -> None:
    """Make libraries that read LOCAL_RANK use the GPU `index`."""
    for name in INDEX:
        if name in os.environ:
            os.environ[name] = str(index)
