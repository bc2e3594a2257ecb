"""Output heads: log-probabilities of a language model, scores of a reward model or critic.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align.losses.linear_head import (
    LogitTransform,
    linear_cross_entropy,
    linear_logits,
    linear_logprobs,
    transformed_logprobs,
)


class TokenHead(nn.Linear):
    """Output head of a language model.

    Returns logits [..., V]. With `tokens_N` it returns the `TokenScores` of `linear_logprobs` instead, and with
    `tokens_N` and `count` the result of `linear_cross_entropy`. Both are computed in `forward`, because ZeRO-3 gathers
    a weight only while its module is called.

    If gradients are disabled, as in sampling, a bf16 head returns fp32 logits, like those inside `linear_logprobs`.

    transform: scale and soft cap of the model's logits, applied to log-probabilities only. Logits are returned without
        them, because the model itself applies them.
    """

    transform = LogitTransform()

    def forward(
        self,
        hidden: Tensor,
        tokens_N: Tensor | None = None,
        temperature: float = 1.0,
        count: float | None = None,
        mean_logits: bool = False,
    ) -> Any:
        if tokens_N is not None:
            scale, cap = self.transform
            if cap is not None or self.bias is not None:
                scores = transformed_logprobs(
                    hidden, self.weight, self.bias, tokens_N, temperature, self.transform, mean_logits=mean_logits
                )
                return scores if count is None else (-scores.logprobs_N.sum() / count, scores)
            if count is not None:
                return linear_cross_entropy(hidden, self.weight, tokens_N, count, temperature / scale)
            return linear_logprobs(hidden, self.weight, tokens_N, temperature / scale, mean_logits=mean_logits)
        if torch.is_grad_enabled() or self.weight.dtype == torch.float32:
            return super().forward(hidden)
        logits = linear_logits(hidden.flatten(0, -2), self.weight).unflatten(0, hidden.shape[:-1])
        return logits if self.bias is None else logits + self.bias


class ScoreHead(nn.Linear):
    """Scores [..., num_labels] in fp32. In bf16, values and scores near 100 would be rounded to multiples of 0.5."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float())


def last_positions(hidden_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Index of each sequence's last attended token [B]. The mask decides, because the pad id may equal EOS."""
    length = hidden_BTD.shape[1]
    if attention_mask is None:
        return torch.full((hidden_BTD.shape[0],), length - 1, device=hidden_BTD.device)
    positions = torch.arange(length, device=hidden_BTD.device)
    return (attention_mask * positions).argmax(dim=-1)
