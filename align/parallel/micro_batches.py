"""Micro-batches distributed over the ranks: every rank has all rows and computes some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from align.parallel.sharding import world

T = TypeVar("T")


def shared_passes(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """Yield (item, whether it counts) for this rank; every rank gets the same number of items.

    Item j goes to rank j mod R. If the number of items is not a multiple of R, the ranks that have none in the last
    pass get a repeated item, which does not count. ZeRO and expert parallelism need every rank in every pass.
    """
    rank, ranks = world()
    for start in range(0, len(items), ranks):
        index = start + rank
        yield (items[index], True) if index < len(items) else (items[start], False)


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """All-reduced sum over the ranks, on the tensor's own device. device: where the all-reduce runs."""
    if world()[1] == 1:
        return tensor
    moved = tensor.to(device)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def largest(tensor: Tensor, device: torch.device) -> Tensor:
    """All-reduced maximum over the ranks, computed in int32, because few backends support smaller integers."""
    if world()[1] == 1:
        return tensor
    moved = tensor.to(device, torch.int32)
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return moved.to(tensor.device, tensor.dtype)
