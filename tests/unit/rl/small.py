"""PPO settings, completions, and models with a few thousand parameters."""

from __future__ import annotations

import torch

from align.config.ppo import PpoStage
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM, HunYuanForSequenceClassification
from align.rl.models import Models
from align.rollout.base import Completion
from align.train.frozen import FrozenModel
from align.train.learner import LocalLearner

PAD = EOS = 0
SIZES = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
}


def completions(*rows: tuple[list[int], list[int], bool]) -> list[Completion]:
    return [Completion(prompt, ids, [-1.0] * len(ids), finished, 0) for prompt, ids, finished in rows]


def settings(**changes) -> PpoStage:
    return PpoStage.model_validate(
        {
            "kind": "ppo",
            "prompts": [{"kind": "file", "path": "none.jsonl"}],
            "rewards": [{"kind": "function", "path": "reference_f1"}],
            **changes,
        }
    )


def build(**config) -> Models:
    torch.manual_seed(0)
    policy, reference = (HunYuanForCausalLM(HunYuanConfig(**SIZES, **config)).eval() for _ in range(2))
    critic = HunYuanForSequenceClassification(HunYuanConfig(**SIZES, num_labels=1, **config)).eval()
    optimizer = settings().optimizer.model_copy(update={"learning_rate": 1e-2})
    return Models(
        LocalLearner(policy, optimizer, total=1), FrozenModel(reference), LocalLearner(critic, optimizer, total=1)
    )
