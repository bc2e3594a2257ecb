"""Tabular policies and critics, whose optimum a test can compute."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from align.config.parts import Optimizer
from align.config.ppo import PpoStage
from align.data.prepare import PromptRow
from align.models.heads import TokenHead
from align.models.packing import Packing
from align.rl.complete import complete_batch
from align.rl.models import Models
from align.rl.sample import RolloutSampler
from align.rl.score import RolloutBatch, score_batch
from align.rl.update import update
from align.rollout.base import Completion, SamplingSettings, SyncReport
from align.train.frozen import FrozenModel
from align.train.learner import Learner, LocalLearner

PROMPT = 0
"""The only prompt: one token."""


class Table(nn.Module):
    """A tabular language model and critic. A state is (number of tokens sampled so far, last token), one-hot encoded.

    `lm_head` holds the logits of every state, `score` the value of every state.
    """

    def __init__(self, horizon: int, tokens: int):
        super().__init__()
        self.horizon, self.tokens = horizon, tokens
        self.lm_head = TokenHead(horizon * tokens, tokens, bias=False)
        self.score = nn.Linear(horizon * tokens, 1, bias=False)
        nn.init.zeros_(self.lm_head.weight)
        nn.init.zeros_(self.score.weight)

    def model(self, input_ids: Tensor, packing: Packing | None = None, **_: Any) -> SimpleNamespace:
        place = torch.arange(input_ids.shape[1]) if packing is None else packing.position_ids
        place = place.clamp_max(self.horizon - 1)
        states = nn.functional.one_hot(place * self.tokens + input_ids, self.horizon * self.tokens)
        return SimpleNamespace(last_hidden_state=states.to(self.lm_head.weight.dtype), router=None, routed_experts=None)


class TableEngine:
    """A rollout engine that samples from the current table."""

    last_generation = last_sync = None

    def __init__(self, table: Table):
        self.table = table

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        generator = torch.Generator().manual_seed(sampling.seed)
        ids = torch.full((len(prompts) * sampling.n, 1), PROMPT)
        logprobs = []
        with torch.no_grad():
            for _ in range(sampling.max_new_tokens):
                state = self.table.model(ids).last_hidden_state[:, -1]
                distribution = (self.table.lm_head(state) / sampling.temperature).log_softmax(-1)
                token = distribution.exp().multinomial(1, generator=generator)
                logprobs.append(distribution.gather(1, token))
                ids = torch.cat([ids, token], dim=1)
        rows = zip(ids[:, 1:].tolist(), torch.cat(logprobs, dim=1).tolist(), strict=True)
        completions = [Completion([PROMPT], tokens, values, True, 0) for tokens, values in rows]
        return [completions[i : i + sampling.n] for i in range(0, len(completions), sampling.n)]

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        raise NotImplementedError

    def close(self) -> None:
        pass


class TokenReward:
    """A `Scorer` that applies a function to each completion's tokens."""

    def __init__(self, function):
        self.function = function

    def score(self, batch: Any, rows: Any, completions: list[Completion]) -> tuple[Tensor, dict]:
        return torch.tensor([float(self.function(c.token_ids)) for c in completions]), {}


class Task:
    """A reward function, and a tabular policy that align's own functions train."""

    def __init__(self, reward, *, horizon: int, tokens: int, **settings: Any):
        rate = settings.pop("learning_rate", 0.05)
        self.stage = PpoStage.model_validate(
            {
                "kind": "ppo",
                "prompts": [{"kind": "file", "path": "none.jsonl"}],
                "rewards": [{"kind": "function", "path": "reference_f1"}],
                "rollout": {"max_new_tokens": horizon},
                **settings,
            }
        )
        optimizer = self.stage.optimizer.model_copy(update={"learning_rate": rate})
        self.policy, self.reference = Table(horizon, tokens), Table(horizon, tokens)
        self.models = Models(
            policy=LocalLearner(self.policy, optimizer, total=self.stage.steps),
            reference=FrozenModel(self.reference),
            critic=self._critic(horizon, tokens, optimizer) if self.stage.advantage_estimator == "gae" else None,
        )
        row = PromptRow((PROMPT,), [{"role": "user", "content": "go"}], None, {})
        self.sampler = RolloutSampler(lambda: TableEngine(self.policy), [row], self.stage, stop_ids=[], seed=0)
        self.scorer = TokenReward(reward)

    def _critic(self, horizon: int, tokens: int, optimizer: Optimizer) -> Learner:
        settings = optimizer.model_copy(update={"learning_rate": self.stage.critic.learning_rate})
        return LocalLearner(Table(horizon, tokens), settings, total=self.stage.steps)

    def iterate(self, step: int) -> tuple[RolloutBatch, dict[str, float]]:
        coef = self.stage.kl.coef
        scored = score_batch(self.stage, self.sampler, self.sampler.sample(), self.scorer)
        metrics = scored.metrics | complete_batch(self.stage, self.models, scored.experience, coef)
        return scored, metrics | update(self.stage, self.models, scored.experience, step=step, seed=0, kl_coef=coef)

    def learn(self) -> list[dict[str, float]]:
        return [self.iterate(step)[1] for step in range(self.stage.steps)]

    def probabilities(self) -> Tensor:
        """Probabilities [states, tokens] of the policy."""
        return self.policy.lm_head.weight.detach().T.softmax(-1)
