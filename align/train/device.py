"""The device of this process."""

from __future__ import annotations

import os

import torch


def training_device() -> torch.device:
    """This process's GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
