"""Compare the sampler's log-probabilities with the trainer's, and end the run if the sampler runs a different model.

Shapes: B completions, T completion tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align.errors import UserError
from align.rollout.vllm_fixes import PAST_LOADERS

TOKENS = 48
"""Tokens that are compared, spread evenly over the completions."""
LIMITS = {"float32": (1e-3, 0.0), "bfloat16": (1.0, 0.1)}
"""{dtype: (largest difference, mean difference)}; the run ends if both are exceeded. In bf16 a router may choose other
experts for a single token, which moves its log-probability far but the mean little."""

AT_START = {
    "gemma2": "attention without its soft cap",
    "gemma3_text": "another sliding window or attention scale",
    "cohere2": "another sliding window",
    "mistral": "another sliding window",
    "apertus": "activation parameters rounded to bf16",
    "deepseek_v2": "other rotary embeddings or another weighting of the experts",
    "deepseek_v3": "routing fields that config.json lacks (scoring_func, topk_method)",
    "glm4_moe_lite": "another number of leading dense layers (first_k_dense_replace)",
    "hy_v3": "routing fields that config.json lacks (route_norm, first_k_dense_replace)",
    "ernie4_5_moe": "routers without their correction bias",
    "minimax_m2": "routers without their correction bias (use_routing_bias)",
    "afmoe": "routing fields that config.json lacks (score_func, route_norm)",
    "lfm2": "other rotary embeddings",
    "gpt_oss": "attention without sinks",
}
"""{model_type: likely cause of a difference in the initial weights}."""
ANOTHER_FUNCTION = "the engine computes another function for this family than transformers, or reads another checkpoint"


class SelfCheck:
    """The self-check of one run: of its initial weights, and of the first weights that an update changed.

    All ranks must make the same calls; each then raises the same error.

    config: configuration of the policy.
    dtype: the recipe's dtype.
    pending: the next samples of the current weights must be compared.
    """

    def __init__(self, config: Any, dtype: str, *, enabled: bool):
        self.config, self.dtype, self.enabled = config, dtype, enabled
        self.pending, self.changed = enabled, False

    def note_update(self, metrics: dict[str, float]) -> None:
        """Note the metrics of an update. The first one with a gradient of the policy has changed the weights."""
        if not self.changed and metrics["policy_updates"] and metrics["policy_grad_norm"] > 0:
            self.pending, self.changed = self.enabled, True

    def compare(self, logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor) -> None:
        """Raise UserError if the log-probabilities of the same weights differ too much where the mask is set.

        logprobs_BT: of the trainer.
        rollout_logprobs_BT: of the rollout engine.
        """
        self.pending = False
        difference = (logprobs_BT - rollout_logprobs_BT).abs()[mask_BT > 0]
        if not len(difference):
            return
        some = difference[torch.linspace(0, len(difference) - 1, min(TOKENS, len(difference))).long()]
        largest, mean = float(some.max()), float(some.mean())
        limit, mean_limit = LIMITS[self.dtype]
        if largest > limit and mean > mean_limit:
            when = "after the first update" if self.changed else "at the start"
            raise UserError(
                f"PPO: the rollout engine samples from another {self.config.model_type} model than the trainer's "
                f"{when}: their log-probabilities of {len(some)} tokens differ by up to {largest:.2g} (limit {limit:g} "
                f"in {self.dtype}). Likely cause: {self._cause()}. Set rollout.engine: huggingface, or self_check: "
                "false to train nevertheless."
            )

    def _cause(self) -> str:
        if not self.changed:
            return AT_START.get(self.config.model_type, ANOTHER_FUNCTION)
        kept = ["the output head"] if getattr(self.config, "tie_word_embeddings", False) else []
        kept += ["attention sinks"] if self.config.model_type in PAST_LOADERS else []
        kept += ["experts"] if getattr(self.config, "num_experts_per_tok", None) else []
        return f"the engine kept old weights of {' or '.join(kept) or 'some layers'}"
