"""A small random policy and its greedy completions, made on the CPU in fp32, so that all machines get the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from align.config.presets import DEFAULT_FAMILY
from align.data.experience import Experience, build_experience
from align.models.family import family

PROMPTS, PROMPT, COMPLETION = 8, 24, 24
"""Number of prompts, tokens of the longest prompt, and tokens of a completion."""


def small_policy(**changes: Any) -> Any:
    """A random policy with two MoE layers. All GPU kernels support its head size and widths."""
    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_topk": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
    }
    torch.manual_seed(0)
    kind: Any = family(DEFAULT_FAMILY)
    policy = kind.policy(kind.config(**(sizes | changes)))
    return policy.eval()


@torch.no_grad()
def greedy_batch(policy: Any) -> Experience:
    """A rollout batch of greedy completions, with prompts of different lengths."""
    random = torch.Generator().manual_seed(1)
    prompts, completions = [], []
    for row in range(PROMPTS):
        prompt = torch.randint(4, policy.config.vocab_size, (1, PROMPT - row), generator=random)
        tokens = prompt
        for _ in range(COMPLETION):
            tokens = torch.cat([tokens, policy(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        prompts.append(prompt[0].tolist())
        completions.append(tokens[0, prompt.shape[1] :].tolist())
    return build_experience(prompts, completions, [[0.0] * COMPLETION] * PROMPTS)


@torch.no_grad()
def perturb(model: nn.Module, size: float = 0.02) -> None:
    """Add normal noise with standard deviation `size` to all weights, more than an optimizer step changes them."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * size)
