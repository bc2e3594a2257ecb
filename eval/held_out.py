"""Measure a model on held-out prompts and preference pairs: lengths, word F1, KL, reward model, implicit preference.

Models are sharded over all ranks under `parallel`, and each rank runs its share of the forward passes. Loading and
measuring are collective: all ranks make these calls in the same order.

Shapes: B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.stages import EvaluateStage
from align.data.experience import Experience, build_experience
from align.eval.data import EvaluationData, Pairs
from align.eval.metrics import best_f1, ordered_pairs
from align.models.forward import policy_output
from align.parallel.micro_batches import shared_passes, summed
from align.reward.components import columns
from align.reward.functions import REFERENCE
from align.reward.model import ModelScorer
from align.rollout.base import Completion
from align.run.context import StageContext
from align.train.checkpoint import load_policy
from align.train.device import training_device
from align.train.frozen import FrozenModel

MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs in the right order; NaN if a value is not finite.

    accuracy: the share; a tie counts half.
    n: number of pairs.
    values: 1, 0.5 (a tie), 0, or NaN per pair.
    """

    accuracy: float
    n: int
    values: list[float]


@dataclass(frozen=True)
class HeldOutResult:
    """One model on the stage's prompts and pairs; lists have one value per prompt. None: not measured.

    checkpoint: the model's folder.
    lengths: completion lengths in tokens, including the stop token.
    eos: True for a completion that ended with a stop token.
    f1: word F1 with the row's reference; None for a row without one.
    kl: k1 estimate of the KL to the reference, summed over the completion's tokens.
    scores: the reward model's scores.
    preference: implicit preference on the pairs.
    """

    checkpoint: str
    lengths: list[int] | None = None
    eos: list[bool] | None = None
    f1: list[float | None] | None = None
    kl: list[float] | None = None
    scores: list[float] | None = None
    preference: Accuracy | None = None

    def to_dict(self) -> dict[str, Any]:
        """The measured fields as plain JSON types."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def load_frozen(folder: Path, context: StageContext) -> FrozenModel:
    """Load a language model in evaluation mode, sharded under `parallel`."""
    dtype, parallel = context.recipe.dtype, context.recipe.parallel
    model = load_policy(folder, dtype, parallel, frozen=True).eval().to(training_device())
    return FrozenModel(model, parallel, dtype)


class HeldOut:
    """The measurements of a stage on its prompts and pairs, with the models that they need.

    The KL estimate needs sampled completions, so the reference is not loaded for greedy decoding.
    """

    def __init__(self, stage: EvaluateStage, context: StageContext, data: EvaluationData):
        self.data, self.temperature = data, stage.rollout.temperature
        self.reference: FrozenModel | None = None
        self.reward_model: ModelScorer | None = None
        if data.prompts and self.temperature > 0:
            self.reference = load_frozen(context.checkpoint(stage.reference or stage.models[0]), context)
        if stage.reward_model is not None:
            self.reward_model = ModelScorer(
                context.checkpoint(stage.reward_model),
                context.recipe.dtype,
                MICRO_BATCH_TOKENS,
                context.recipe.parallel,
            )

    def measure(
        self, folder: Path, model: FrozenModel, completions: Sequence[Completion], texts: Sequence[str]
    ) -> HeldOutResult:
        """Measure one model: on the prompts from its `completions` and their `texts`, on the pairs from its
        log-probabilities."""
        found: dict[str, Any] = {}
        if completions:
            found["lengths"] = [len(c.token_ids) for c in completions]
            found["eos"] = [c.finished for c in completions]
            rows = zip(texts, self.data.prompts, strict=True)
            f1 = [best_f1(text, columns(row).get(REFERENCE)) for text, row in rows]
            found["f1"] = f1 if any(value is not None for value in f1) else None
            batch = build_experience(
                [c.prompt_ids for c in completions],
                [c.token_ids for c in completions],
                [c.logprobs for c in completions],
            )
            if self.reference is not None:
                # The engine's log-probabilities are the model's own, so only the reference needs a forward pass.
                reference_logprobs = sequence_logprobs(self.reference, batch, self.temperature)
                found["kl"] = (batch.rollout_logprobs.sum(1) - reference_logprobs).tolist()
            if self.reward_model is not None:
                found["scores"] = self.reward_model.scores(batch).tolist()
        if self.data.pairs:
            found["preference"] = self._accuracy(lambda batch: sequence_logprobs(model, batch, 1.0))
        return HeldOutResult(str(folder), **found)

    def reward_model_accuracy(self) -> Accuracy | None:
        """Accuracy of the reward model itself on the pairs; None if the stage has no reward model or no pairs."""
        if self.reward_model is None or not self.data.pairs:
            return None
        return self._accuracy(self.reward_model.scores)

    def _accuracy(self, score: Callable[[Experience], Tensor]) -> Accuracy:
        """Accuracy on the pairs if completions are ordered by `score`, which returns one value per completion, [B]."""
        chosen, rejected = (score(completions_of(self.data.pairs, side)).tolist() for side in ("chosen", "rejected"))
        values = ordered_pairs(chosen, rejected)
        return Accuracy(sum(values) / len(values), len(values), values)


def completions_of(pairs: Pairs, side: str) -> Experience:
    """The chosen or the rejected completions as a batch."""
    completions = [pair[f"{side}_ids"] for pair in pairs]
    return build_experience([p["prompt_ids"] for p in pairs], completions, [[0.0] * len(c) for c in completions])


def sequence_logprobs(model: FrozenModel, batch: Experience, temperature: float) -> Tensor:
    """Log-probability of each completion [B], summed over its tokens, on every rank.

    Each rank runs its share of the micro-batches.
    """
    values, device = torch.zeros(len(batch)), training_device()
    micro_batches = list(batch.micro_batches(torch.arange(len(batch)), MICRO_BATCH_TOKENS))
    for micro_batch, counts in shared_passes(micro_batches):
        logprobs = model.run(policy_output, batch.rows(micro_batch).to(device), temperature).logprobs
        if counts:
            values[micro_batch] = logprobs.sum(1).float().cpu()
    return summed(values, device)
