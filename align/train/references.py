"""Log-probabilities of completions under the frozen reference, computed once for a data set and cached on disk.

The cache is keyed by everything that determines the values: weights of the reference, rows, and precision. It is used
by later epochs, by resumed runs, and by other runs on the same rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from align.train.passes import PackedPass, parts_of_rank
from align.train.trainer import Examples, row_order

VERSION = 1
"""Part of the key; to be raised when the computation changes."""
WINDOW = 1024
"""Rows that are packed together; the cache is written after each window."""


@dataclass(frozen=True)
class References:
    """Log-probabilities of the chosen and rejected completions [rows, 2]; NaN for rows that the run does not read."""

    train: np.ndarray
    held_out: np.ndarray | None


def reference_logprobs(
    parent: Path, stage: TrainingStage, context: StageContext, data: Prepared, objective: Objective
) -> References:
    """Log-probabilities under the checkpoint `parent`; collective. The reference is in memory only while it computes.

    objective: makes the rows' examples.
    """
    reference = _Lazy(parent, context.trained_dtype(stage.lora), context)
    key = {
        "version": VERSION,
        "weights": from_rank_0(
            "hash the reference", lambda: digests(checkpoint_files(parent), cache_folder(stage.data.cache))
        ),
        "rows": data.report.fingerprint,
        "dtype": [context.trained_dtype(stage.lora), context.recipe.dtype],
    }
    wanted = _rows_read(stage, data.train, context.seed)
    train = _completed("train", data.train, wanted, key, stage, context, objective, reference)
    held_out = None
    if data.held_out is not None:
        every = range(len(data.held_out))
        held_out = _completed("held_out", data.held_out, every, key, stage, context, objective, reference)
    return References(train, held_out)


class _Lazy:
    """The reference, loaded when it is first needed. dtype: that of the policy, so that they are equal at first."""

    def __init__(self, parent: Path, dtype: str, context: StageContext):
        self.parent, self.dtype, self.context = parent, dtype, context
        self.model: FrozenModel | None = None

    def logprobs(self, packed: PackedPass) -> Tensor:
        """Log-probability of each sequence's tokens with a loss [S], in float64 on the CPU."""
        recipe = self.context.recipe
        if self.model is None:
            model = load_policy(self.parent, self.dtype, recipe.parallel, frozen=True).eval()
            model = model if recipe.parallel else model.to(self.device)
            self.model = FrozenModel(model, recipe.parallel, recipe.dtype)
        autocast = recipe.dtype == "bfloat16" and recipe.parallel is None
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            values: Tensor = self.model.run(sequence_logprobs, packed)
        return values.double().cpu()

    @property
    def device(self) -> torch.device:
        return training_device()


def sequence_logprobs(model: AnyModel, packed: PackedPass) -> Tensor:
    """Sum of the log-probabilities of each sequence's tokens with a loss [S]."""
    policy = unwrap(model)
    hidden = packed.predicting(packed.forward(policy.model).last_hidden_state)
    return packed.by_sequence(policy.lm_head(hidden, packed.predicted_N).logprobs_N)


def _completed(
    split: str,
    rows: Any,
    wanted: Sequence[int],
    key: dict[str, Any],
    stage: TrainingStage,
    context: StageContext,
    objective: Objective,
    reference: _Lazy,
) -> np.ndarray:
    """The values of a split, from the cache as far as it has them."""
    digest = hashlib.sha256(json.dumps({**key, "split": split}, sort_keys=True).encode()).hexdigest()
    path = cache_folder(stage.data.cache).parent / "references" / f"{digest}.npy"
    examples = Examples(rows, objective)
    values: np.ndarray = from_rank_0("read the reference's log-probabilities", lambda: _read(path, len(rows)))
    missing = [row for row in wanted if np.isnan(values[row]).any()]
    if not missing:
        context.say(f"  reference: log-probabilities of {len(wanted):,} {split.replace('_', '-')} rows from the cache")
        return values
    rank, ranks = world()
    for start in range(0, len(missing), WINDOW):
        window = missing[start : start + WINDOW]
        members = [examples[row] for row in window]
        found = torch.zeros(len(window), 2, dtype=torch.float64)
        for part in parts_of_rank(members, stage.pass_tokens, rank, ranks):
            logprobs = reference.logprobs(PackedPass([members[i] for i in part.items], reference.device))
            if part.counts:
                found[part.items] = logprobs.view(-1, 2)
        values[window] = summed(found, reference.device).numpy()
        context.status(f"  reference: {start + len(window):,} of {len(missing):,} {split.replace('_', '-')} rows")
        from_rank_0("write the reference's log-probabilities", lambda: _write(path, values))
    return values


def _read(path: Path, rows: int) -> np.ndarray:
    """The cached values; NaN where there are none."""
    try:
        values: np.ndarray = np.load(path)
    except (OSError, ValueError):
        return np.full((rows, 2), np.nan)
    return values


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
