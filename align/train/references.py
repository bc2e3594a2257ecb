"""Log-probabilities of completions under the frozen reference, computed once for a data set and cached on disk.

The cache is keyed by everything that determines the values: weights of the reference, rows, precision, and
quantisation. It is used by later epochs, by resumed runs, and by other runs on the same rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from align.config.stages import TrainingStage
from align.data.prepare import Prepared
from align.models.forward import unwrap
from align.models.lora.adapters import AnyModel
from align.parallel.group import from_rank_0
from align.parallel.micro_batches import summed
from align.parallel.sharding import world
from align.run.cache import cache_folder, writing
from align.run.context import StageContext
from align.run.folder import replace_file
from align.run.inputs import checkpoint_files, digests
from align.train.checkpoint import load_policy
from align.train.device import training_device
from align.train.frozen import FrozenModel
from align.train.objectives import Objective
from align.train.passes import Example, PackedPass, parts_of_rank
from align.train.steps import Examples, row_order

VERSION = 1
"""Part of the cache key. Increase it when the computation changes."""
WINDOW = 1024
"""Rows that are packed together; the cache is written after each window."""


class ExampleRows(Protocol):
    """Rows as examples, by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Example: ...


@dataclass(frozen=True)
class References:
    """Log-probabilities of the completions of each row [rows, completions per row].

    A pair has two completions, chosen and rejected. Values are NaN for rows that the run does not read.
    """

    train: np.ndarray
    held_out: np.ndarray | None


def reference_logprobs(
    parent: Path, stage: TrainingStage, context: StageContext, data: Prepared, objective: Objective
) -> References:
    """Log-probabilities under the checkpoint `parent`; collective. The reference is in memory only while it computes.

    objective: makes the rows' examples.
    """
    return Reference(parent, stage, context, data).of_data(objective)


class Reference:
    """The frozen checkpoint `parent` and the cache of its log-probabilities. It is loaded when it is first needed.

    Its precision and quantisation are those of the policy, so that they are equal at first.
    """

    def __init__(self, parent: Path, stage: TrainingStage, context: StageContext, data: Prepared):
        self.parent, self.stage, self.context, self.data = parent, stage, context, data
        self.dtype = context.trained_dtype(stage.lora)
        self.key = {
            "version": VERSION,
            "weights": from_rank_0(
                "hash the reference", lambda: digests(checkpoint_files(parent), cache_folder(stage.data.cache))
            ),
            "rows": data.report.fingerprint,
            "dtype": [self.dtype, context.recipe.dtype],
        }
        if stage.lora is not None and stage.lora.quantize is not None:
            self.key["quantized"] = [stage.lora.quantize, *stage.lora.modules_to_save]
        self.model: FrozenModel | None = None

    def of_data(self, objective: Objective) -> References:
        """Log-probabilities of the training and held-out rows; collective."""
        train, held_out = self.data.train, self.data.held_out
        wanted = _rows_read(self.stage, train, self.context.seed)
        return References(
            self.of("train", Examples(train, objective), wanted),
            None if held_out is None else self.of("held_out", Examples(held_out, objective), range(len(held_out))),
        )

    def of(self, split: str, rows: ExampleRows, wanted: Sequence[int], **key: str) -> np.ndarray:
        """Log-probabilities of rows [rows, sequences per row]; those that the cache lacks are computed. Collective.

        wanted: indices of the rows that are needed.
        key: additional parts of the cache key.
        """
        digest = hashlib.sha256(json.dumps({**self.key, "split": split, **key}, sort_keys=True).encode()).hexdigest()
        path = cache_folder(self.stage.data.cache).parent / "references" / f"{digest}.npy"
        shape, name = (len(rows), self.stage.sequences_per_row), split.replace("_", "-")
        values: np.ndarray = from_rank_0("read the reference's log-probabilities", lambda: _read(path, shape))
        missing = [row for row in wanted if np.isnan(values[row]).any()]
        if not missing:
            if len(wanted):
                self.context.say(f"  reference: log-probabilities of {len(wanted):,} {name} rows from the cache")
            return values
        for start in range(0, len(missing), WINDOW):
            window = missing[start : start + WINDOW]
            values[window] = self._computed([rows[row] for row in window], shape[1])
            self.context.status(f"  reference: {start + len(window):,} of {len(missing):,} {name} rows")
            from_rank_0("write the reference's log-probabilities", lambda: _write(path, values))
        return values

    def _computed(self, examples: Sequence[Example], sequences: int) -> np.ndarray:
        device, (rank, ranks) = training_device(), world()
        found = torch.zeros(len(examples), sequences, dtype=torch.float64)
        for part in parts_of_rank(examples, self.stage.pass_tokens, rank, ranks):
            logprobs = self._logprobs(PackedPass([examples[item] for item in part.items], device))
            if part.counts:
                found[part.items] = logprobs.view(-1, sequences)
        values: np.ndarray = summed(found, device).numpy()
        return values

    def _logprobs(self, packed: PackedPass) -> Tensor:
        """Log-probability of each sequence's tokens with a loss [S], in float64 on the CPU."""
        recipe, device = self.context.recipe, training_device()
        if self.model is None:
            adapters = self.stage.lora
            model = load_policy(self.parent, self.dtype, recipe.parallel, frozen=True, quantized_for=adapters).eval()
            model = model if recipe.parallel else model.to(device)
            self.model = FrozenModel(model, recipe.parallel, recipe.dtype)
        autocast = recipe.dtype == "bfloat16" and recipe.parallel is None
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            values: Tensor = self.model.run(sequence_logprobs, packed)
        return values.double().cpu()


def sequence_logprobs(model: AnyModel, packed: PackedPass) -> Tensor:
    """Sum of the log-probabilities of each sequence's tokens with a loss [S]."""
    policy = unwrap(model)
    hidden = packed.predicting(packed.forward(policy.model).last_hidden_state)
    return packed.by_sequence(policy.lm_head(hidden, packed.predicted_N).logprobs_N)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The cached values; NaN where there are none."""
    try:
        values: np.ndarray = np.load(path)
    except (OSError, ValueError):
        return np.full(shape, np.nan)
    return values if values.shape == shape else np.full(shape, np.nan)


def _write(path: Path, values: np.ndarray) -> None:
    def write(target: Path) -> None:
        with open(target, "wb") as file:
            np.save(file, values)

    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)


def _rows_read(stage: TrainingStage, rows: Any, seed: int) -> Sequence[int]:
    """The rows that the run trains on: all, unless `max_steps` or `epochs` end it before the first epoch does."""
    steps = stage.max_steps or math.ceil(stage.epochs * math.ceil(len(rows) / stage.batch_size))
    if steps * stage.batch_size >= len(rows):
        return range(len(rows))
    return sorted(list(row_order(stage, rows, seed))[: steps * stage.batch_size])
