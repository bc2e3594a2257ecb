"""Assign an epoch's micro-batches to ranks, so that every step equals the step of a single process.

A step has `batch_size / micro_batch_size` micro-batches; the epoch's last step may have fewer. With R ranks,
micro-batch j of a step goes to rank j mod R. Each micro-batch is weighted by its number of rows, because the epoch's
last micro-batch may have fewer rows than the others. If the last step's number of micro-batches is not a multiple of R,
the ranks without one in the step's last pass repeat the step's first micro-batch with weight 0. ZeRO needs every rank
in every pass, and weight 0 leaves the update unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

ROW_WEIGHT = "row_weight"
"""Key in a micro-batch for its weight in a mean over the step's rows; the weight is 1 before an epoch's last step."""

TOKEN_WEIGHT = "token_weight"
"""Key in a micro-batch for its weight in a mean over the step's valid tokens."""


class SharedBatches(Sampler):
    """Batch sampler of this rank's micro-batches in an epoch; each is a list of (row number, row weight)."""

    def __init__(self, rows: Any, *, micro_batch_size: int, micro_batches: int, rank: int, ranks: int):
        """
        rows: sampler of row numbers.
        micro_batches: number of micro-batches of a full step on all ranks; a multiple of `ranks`.
        """
        self.rows, self.micro_batch_size, self.micro_batches = rows, micro_batch_size, micro_batches
        self.rank, self.ranks = rank, ranks

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(math.ceil(len(self.rows) / self.micro_batch_size), self.micro_batches)
        return (full * self.micro_batches) // self.ranks + math.ceil(rest / self.ranks)

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        order, size = list(self.rows), self.micro_batch_size
        micros = [order[start : start + size] for start in range(0, len(order), size)]
        for start in range(0, len(micros), self.micro_batches):
            step = micros[start : start + self.micro_batches]
            passes = math.ceil(len(step) / self.ranks)
            rows = sum(map(len, step))
            for number in range(passes):
                place = number * self.ranks + self.rank
                if place < len(step):
                    weight = passes * self.ranks * len(step[place]) / rows
                    yield [(row, weight) for row in step[place]]
                else:
                    yield [(row, 0.0) for row in step[0]]


class SharedRows(Dataset):
    """Rows indexed by (row number, row weight); an item is (row, row weight)."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, float]) -> tuple[dict[str, Any], float]:
        row, weight = key
        return self.rows[row], weight


def gather_uneven(gather: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap `Accelerator.gather` for tensors whose length differs between ranks, as it does at the end of an epoch."""

    def gathered(tensor: Any) -> Any:
        if not torch.is_tensor(tensor) or tensor.ndim == 0:
            return gather(tensor)
        sizes = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = gather(padded).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gathered


class SharedLoader(DataLoader):
    """Loader of collated micro-batches with their weight; a repeated micro-batch (weight 0) has no valid labels."""

    def __init__(
        self, rows: Any, batches: SharedBatches, collate: Callable[[list[dict]], dict[str, Any]], **kwargs: Any
    ):
        def with_weight(items: list[tuple[dict[str, Any], float]]) -> dict[str, Any]:
            batch = collate([row for row, _ in items])
            weight = items[0][1]
            if weight == 0 and "labels" in batch:
                batch["labels"].fill_(-100)
            return {**batch, ROW_WEIGHT: weight}

        super().__init__(SharedRows(rows), batch_sampler=batches, collate_fn=with_weight, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, SharedBatches)
        self.batch_sampler.set_epoch(epoch)
