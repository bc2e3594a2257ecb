"""The reward mixture of a stage: the weighted sum of its rewards for each completion.

Shapes: B completions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.config import rewards as config
from align.data.chat import tokenizer_fingerprint
from align.data.experience import Experience
from align.data.prepare import PromptRow
from align.errors import UserError
from align.parallel.group import from_rank_0
from align.reward.components import Component, Samples, build_component, require_columns, require_finite_scores
from align.reward.model import ModelScorer
from align.reward.moments import Moments
from align.reward.process import FunctionProcess, Scored
from align.rollout.base import Completion

Metrics = dict[str, float]


class Scorer:
    """The rewards of a stage, loaded once.

    All ranks make the same calls and get the same scores. Local reward models are sharded over all ranks, which run
    them together. Functions, verifiers and servers are called on rank 0 only.

    prompts: all prompts of the stage.
    tokenizer: the policy's.
    load_models: loads the reward models and returns them by their `init_from`.
    gather: returns the moments of all processes, given those of this process. Needed if processes score different
        completions, so that all of them normalise by the same moments.

    Raises UserError for a missing column, a faulty function, an unusable checkpoint or a server that is down.
    """

    def __init__(
        self,
        rewards: Sequence[config.Reward],
        prompts: Sequence[PromptRow],
        tokenizer: PreTrainedTokenizerBase,
        *,
        load_models: Callable[[], Mapping[str, ModelScorer]],
        say: Callable[[str], None] = print,
        gather: Callable[[Moments], Sequence[Moments]] = lambda moments: [moments],
    ):
        require_columns(rewards, prompts)
        self.rewards, self.tokenizer = rewards, tokenizer
        self.say, self.gather = say, gather
        self.moments = {reward.label: Moments() for reward in rewards if reward.normalise == "running"}
        self.process = FunctionProcess()
        # Models last: they may take minutes to load, and a faulty function or server shows within seconds.
        self.components: dict[str, Component] = {}
        from_rank_0("loading reward functions", self._load_components)
        models = load_models()
        self.models = {
            r.label: self._model(r, models[r.init_from]) for r in rewards if isinstance(r, config.ModelReward)
        }

    @torch.no_grad()
    def score(
        self, batch: Experience, rows: Sequence[PromptRow], completions: Sequence[Completion]
    ) -> tuple[Tensor, Metrics]:
        """Score completions; returns (scores [B], metrics of each reward).

        batch: the completions as tensors, for reward models. rows: the prompt of each completion.
        Raises UserError with the reward and the completion if a score is missing or not finite.
        """
        samples = Samples(rows, completions, self.tokenizer)
        total = torch.zeros(len(samples))
        metrics: Metrics = {}
        for reward in self.rewards:
            start = time.perf_counter()
            if isinstance(reward, config.ModelReward):
                scored = self.models[reward.label](batch, samples)
            else:
                scored = from_rank_0(f"reward '{reward.label}'", partial(self._call, reward.label, samples))
            seconds = time.perf_counter() - start
            missing = [score is None for score in scored.scores]
            self._report_missing(reward, scored, missing)
            failure_score = getattr(reward, "failure_score", None) or 0.0
            values = [failure_score if score is None else score for score in scored.scores]
            metrics |= score_metrics(reward.label, values, sum(missing), seconds)
            total += reward.weight * torch.tensor(self._scaled(reward, values))
        # The sum is a float32, which overflows at 3e38.
        require_finite_scores("the sum of all rewards", total.tolist(), samples, "Lower the weights of the rewards")
        return total, metrics

    def state_dict(self) -> dict[str, Any]:
        """Moments of all scores up to now, as JSON types, for a checkpoint."""
        return {name: [m.count, m.mean, m.squares] for name, m in self.moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments |= {name: Moments(*state[name]) for name in self.moments if name in state}

    def close(self) -> None:
        """End the process of users' functions."""
        self.process.close()

    def _load_components(self) -> None:
        self.components |= {
            r.label: build_component(r, self.process, self.tokenizer)
            for r in self.rewards
            if not isinstance(r, config.ModelReward)
        }

    def _call(self, label: str, samples: Samples) -> Scored:
        return self.components[label](samples)

    def _scaled(self, reward: config.RewardBase, values: list[float]) -> list[float]:
        if reward.normalise == "running":
            moments = self.moments[reward.label]
            for part in self.gather(Moments.of(values)):
                moments = moments.merged(part)
            self.moments[reward.label] = moments
            values = [moments.normalised(value) for value in values]
        limit = float("inf") if reward.clip is None else reward.clip
        return [min(max(value, -limit), limit) for value in values]

    def _report_missing(self, reward: config.RewardBase, scored: Scored, missing: list[bool]) -> None:
        if not scored.problem or not any(missing):
            return
        if all(missing):
            raise UserError(
                f"reward '{reward.label}': none of {len(missing)} completions could be scored (the last one: "
                f"{scored.problem}). Fix the cause, or remove the reward."
            )
        self.say(f"  reward '{reward.label}': {sum(missing)} of {len(missing)} completions failed ({scored.problem})")

    def _model(self, reward: config.ModelReward, scorer: ModelScorer) -> Callable[[Experience, Samples], Scored]:
        """Component of a reward model. Unlike other components it also takes the batch, with the policy's token ids."""
        same = tokenizer_fingerprint(scorer.tokenizer) == tokenizer_fingerprint(self.tokenizer)
        if not same:
            self.say(
                f"  reward '{reward.label}': its tokenizer or chat template differs from the policy's; prompts and "
                "completions are re-tokenized"
            )

        def component(batch: Experience, samples: Samples) -> Scored:
            batch = replace(batch, routed_experts=None)  # the recorded routing is the policy's
            if not same:
                texts = zip(samples.prompt_rows, samples.texts, samples.completions, strict=True)
                ids = [scorer.encode(row.messages, text, c.finished, row.variables) for row, text, c in texts]
                batch = scorer.pad([prompt for prompt, _ in ids], [completion for _, completion in ids])
            scores = scorer.scores(batch).tolist()
            require_finite_scores(f"reward model '{reward.label}'", scores, samples, "Use an earlier checkpoint of it")
            return Scored(scores)

        return component


def score_metrics(label: str, values: Sequence[float], missing: int, seconds: float) -> Metrics:
    """Metrics of a reward's scores before they are normalised, clipped and weighted."""
    moments = Moments.of(values)
    return {
        f"reward/{label}": moments.mean,
        f"reward/{label}/std": moments.std,
        f"reward/{label}/min": min(values),
        f"reward/{label}/max": max(values),
        f"reward/{label}/failures": missing / len(values),
        f"time/reward/{label}": round(seconds, 3),
    }
