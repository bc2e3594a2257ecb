"""Passes through a model dealt out to the ranks, where all ranks hold all rows and each computes some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from align.parallel.sharding import world

T = TypeVar("T")


def shared_passes(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """This rank's items and whether they count, equally many on every rank.

    Item j goes to rank j mod R. Where the last ones do not suffice for all, the others repeat one that does not count:
    every rank takes part in every pass, as ZeRO and experts on other ranks need it.
    """
    rank, ranks = world()
    for start in range(0, len(items), ranks):
        place = start + rank
        yield (items[place], True) if place < len(items) else (items[start], False)


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum over the ranks, on all of them; `device`: where this rank computes."""
    if world()[1] == 1:
        return tensor
    moved = tensor.to(device)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def largest(tensor: Tensor, device: torch.device) -> Tensor:
    """The maximum over the ranks, on all of them; for integers that few collectives know."""
    if world()[1] == 1:
        return tensor
    moved = tensor.to(device, torch.int32)
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return moved.to(tensor.device, tensor.dtype)
