"""The device of this process."""

from __future__ import annotations

import torch

from align.launch.devices import own_gpu


def training_device() -> torch.device:
    """This process's GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", own_gpu(torch.cuda.device_count()))
    return torch.device("cpu")
