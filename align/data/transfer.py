"""Copies between host and device, with as few synchronizations as possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy to a GPU is queued from pinned memory, so the host does not wait for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def indices_to_device(indices: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copy 1-D integer tensors to `device` in one transfer."""
    if device.type == "cpu":
        return indices
    whole = to_device(torch.cat(list(indices)), device)
    return torch.split(whole, [len(index) for index in indices])


def to_host(tensors: Sequence[Tensor]) -> list[float]:
    """Values of scalars and 1-D tensors, one after another, read in one transfer, which waits for the device."""
    values: list[float] = torch.cat([t.detach().double().reshape(-1) for t in tensors]).tolist() if tensors else []
    return values
