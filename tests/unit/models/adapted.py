"""Sizes of a tiny HunYuan model with routed experts, and helpers for models with adapters."""

from __future__ import annotations

from typing import Any

import torch

TOKENS = torch.arange(3, 19).view(2, 8)
"""Two sequences of eight tokens."""
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "moe_topk": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def moved(model: Any, seed: int = 0, std: float = 0.05) -> Any:
    """Move every trained value at random; returns the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def logprobs(model: Any) -> torch.Tensor:
    """Log-probabilities [2, 8, V] of `TOKENS`, in float32; with a gradient where gradients are enabled."""
    return model(input_ids=TOKENS, use_cache=False).logits.float().log_softmax(-1)


def fixed_logprobs(model: Any) -> torch.Tensor:
    """`logprobs` without a gradient."""
    with torch.no_grad():
        return logprobs(model)
