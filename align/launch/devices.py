"""Choose the GPU of a process among the visible GPUs. Does not import torch."""

from __future__ import annotations

import os

from align.errors import UserError
from align.launch.processes import whole_number

INDEX = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
"""Variables that DeepSpeed, accelerate and torch use as the index of the process's GPU."""


def own_gpu(visible: int) -> int:
    """Index of this process's GPU among the `visible` ones.

    LOCAL_RANK numbers the ranks of a machine, so it is the index if each rank sees all GPUs. A launcher may also make
    only one GPU visible to each rank (Slurm does so with --gpus-per-task); the index is then 0.
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
    """Set those variables of `INDEX` that exist to `index`, for libraries that choose the GPU by them."""
    for name in INDEX:
        if name in os.environ:
            os.environ[name] = str(index)
