"""The rows of a run as examples, in the order of its optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from align.config.stages import TrainingStage
from align.data.store.stream import StreamedRows
from align.data.store.tokenised import list_lengths
from align.train.objectives import Objective
from align.train.passes import Example


class Examples(torch.utils.data.Dataset):
    """The rows of a data set as examples."""

    def __init__(self, rows: Dataset | StreamedRows, objective: Objective):
        self.rows, self.objective = rows.select_columns(list(objective.columns)), objective

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Example:
        return self.objective.example(self.rows[number], number)


class StepLoader(DataLoader):
    """Loader of an epoch's optimizer steps. transformers sets the epoch of a loader, not of its sampler."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, Steps)
        self.batch_sampler.set_epoch(epoch)


def as_step(examples: list[Example]) -> dict[str, list[Example]]:
    """An item of the loader; transformers requires a dictionary."""
    return {"examples": examples}


class Steps(Sampler):
    """Batch sampler of an epoch's optimizer steps. The last one may have fewer rows."""

    def __init__(self, rows: Any, batch_size: int):
        """rows: sampler of row numbers."""
        self.rows, self.batch_size = rows, batch_size

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.rows)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


def row_order(stage: TrainingStage, rows: Dataset | StreamedRows, seed: int) -> Any:
    """Sampler of the rows' numbers in random order; an epoch's order depends only on the seed and the epoch.

    A stream is shuffled already, so its rows are read in order.
    """
    if isinstance(rows, StreamedRows):
        assert stage.max_steps is not None
        return InOrder(stage.max_steps * stage.batch_size)
    if stage.group_by_length:
        return LengthGroups(row_lengths(rows), stage.batch_size, seed)
    return SeedableRandomSampler(rows, data_seed=seed)


def steps_of_run(stage: TrainingStage, rows: Dataset, seed: int) -> Iterator[list[int]]:
    """Row numbers of every optimizer step of the run, in order."""
    steps = Steps(row_order(stage, rows, seed), stage.batch_size)
    count = stage.max_steps or math.ceil(stage.epochs * len(steps))
    for number in range(math.ceil(count / len(steps))):
        steps.set_epoch(number)
        yield from islice(steps, count - number * len(steps))


class InOrder(Sampler):
    """Sampler of row numbers in ascending order."""

    def __init__(self, rows: int):
        self.rows = rows

    def set_epoch(self, epoch: int) -> None:
        """Ignore the epoch: the rows of a stage that streams are one epoch."""

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rows))


class LengthGroups(Sampler):
    """Sampler that puts rows of similar length into the same batch, in random order.

    An epoch's order depends only on the seed and the epoch's number.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens per row; for a pair, the tokens of its longer side, which for DPO exclude the prompt."""
    if "completion_ids" in dataset.column_names:
        both: list[int] = (list_lengths(dataset, "prompt_ids") + list_lengths(dataset, "completion_ids")).tolist()
        return both
    names = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names]
    lengths: list[int] = np.max([list_lengths(dataset, name) for name in names], axis=0).tolist()
    return lengths
