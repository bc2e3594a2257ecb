"""The score of a completion: the weighted sum of the recipe's rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.config.rewards import FunctionReward, Reward
from align.data import PromptRow
from align.models.lora import AnyModel
from align.reward.functions import call_reward_function, load_reward_function
from align.rollout.base import Completion
from align.rollout.experience import Experience, sequence_scores


class Scorer:
    """Scores rounds by the rewards of a recipe; `models` are the reward models under the names of `init_from`."""

    def __init__(self, rewards: Sequence[Reward], models: dict[str, AnyModel], *, micro_batch_tokens: int):
        self.rewards, self.models, self.micro_batch_tokens = rewards, models, micro_batch_tokens

    @torch.no_grad()
    def score(
        self, batch: Experience, rows: list[PromptRow], completions: list[Completion], tokenizer: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """Scores [B] and each reward's mean."""
        total, metrics = torch.zeros(len(batch)), {}
        for reward in self.rewards:
            if isinstance(reward, FunctionReward):
                name = reward.path
                texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
                prompts = [row.messages[-1]["content"] for row in rows]
                function = load_reward_function(reward.path)
                values = torch.tensor(call_reward_function(name, function, prompts, texts, [r.row for r in rows]))
            else:
                name = reward.init_from
                values = torch.zeros(len(batch))
                for micro in batch.micro_batches(torch.arange(len(batch)), self.micro_batch_tokens):
                    values[micro] = sequence_scores(self.models[name], batch.rows(micro))
            metrics[f"reward/{name}"] = values.mean().item()
            total = total + reward.weight * values
        return total, metrics

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
