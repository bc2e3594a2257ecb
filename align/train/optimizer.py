"""AdamW with parameter groups for routed experts, LoRA's B factors and vectors, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from align.config.parts import Optimizer


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters.

    The learning rate of routed experts is multiplied by expert_learning_rate_scale, and that of adapters' B factors by
    lora_b_learning_rate_scale. Norms, biases and other vectors have no weight decay. For a parameter partitioned by
    ZeRO-3, the shape before partitioning decides whether it is a vector.

    DeepSpeed requires expert-parallel parameters to be in separate parameter groups, each with the name of its process
    group.
    """
    groups: dict[tuple[bool, bool, bool, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            expert_group = getattr(parameter, "group_name", "")
            is_b = ".lora_B." in name and settings.lora_b_learning_rate_scale != 1
            groups.setdefault((".experts." in name, is_b, dimensions > 1, expert_group), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": settings.learning_rate
                * (settings.expert_learning_rate_scale if is_expert else 1.0)
                * (settings.lora_b_learning_rate_scale if is_b else 1.0),
                "weight_decay": settings.weight_decay if decays else 0.0,
                **({"moe": True, "name": expert_group} if expert_group else {}),
            }
            for (is_expert, is_b, decays, expert_group), parameters in sorted(groups.items())
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,  # one pass over each parameter instead of a dozen; five times faster on a CPU
    )


def schedule_factor(step: int, total: int, settings: Optimizer) -> float:
    """Factor on the peak learning rate at `step` (0-based) of `total` steps: linear warm-up, then the schedule."""
    warmup = math.ceil(settings.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "linear":
        return 1 - progress
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
