"""The device of this process."""

from __future__ import annotations

import gc
import os
import resource
from typing import TYPE_CHECKING

import torch

from align.launch.devices import own_gpu

if TYPE_CHECKING:
    from transformers import TrainingArguments


def training_device() -> torch.device:
    """This process's GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", own_gpu(torch.cuda.device_count()))
    return torch.device("cpu")


def train_on_one_gpu(arguments: TrainingArguments) -> None:
    """Keep transformers from wrapping the model in nn.DataParallel, which TRL refuses, if several GPUs are visible.

    The other GPUs stay visible, because rollout servers and tensor parallelism of this run may use them.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def one_of_several_gpus() -> str | None:
    """Notice for the user if several GPUs are visible but this process uses only the first; otherwise None."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    name = torch.cuda.get_device_name(0)
    return f"GPU {first} ({name}) trains, the first of {count} visible GPUs; --nproc {count} uses all of them"


def peak_bytes() -> int:
    """Peak memory in bytes of this process since its start; on a GPU, of its tensors."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_cached_memory() -> None:
    """Release GPU memory that torch caches but no tensor uses, so that other libraries can allocate it."""
    if torch.cuda.is_available():
        gc.collect()  # models of finished stages are in reference cycles
        torch.cuda.empty_cache()
