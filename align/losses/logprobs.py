"""Log-probabilities of given tokens, and entropy, from logits.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token], [N] in fp32."""
    scaled = logits_NV.float() / temperature
    return scaled.gather(-1, tokens_N[..., None]).squeeze(-1) - scaled.logsumexp(-1)


def token_entropy(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats, [N] in fp32."""
    logprobs = (logits_NV.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def logprob_stats(logits_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(token_logprobs, token_entropy) without gradients, for logging."""
    return token_logprobs(logits_NV, tokens_N, temperature), token_entropy(logits_NV, temperature)
