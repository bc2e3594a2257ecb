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
    """This rank's items, each with True if it counts; equally many on every rank.

    Item j goes to rank j mod R. If the last items do not suffice for all ranks, the other ranks repeat one that does
    not count: ZeRO and expert parallelism need every rank in every pass.
    """
    rank, ranks = world()
    for start in range(0, len(items), ranks):
        index = start + rank
        yield (items[index], True) if index < len(items) else (items[start], False)


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """All-reduced sum over the ranks. device: where this rank computes."""
    if world()[1] == 1:
        return tensor
    moved = tensor.to(device)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def largest(tensor: Tensor, device: torch.device) -> Tensor:
    """All-reduced maximum over the ranks, for integers that fit in int32; few collectives support smaller types."""
    if world()[1] == 1:
        return tensor
    moved = tensor.to(device, torch.int32)
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return moved.to(tensor.device, tensor.dtype)
