"""Losses and metrics of a router: balance loss, z-loss, expert load, entropy. Padding (mask_T 0) is excluded.

Each is computed over the valid tokens of one call. The z-loss of a step is the mean over its micro-batches, weighted by
their valid tokens. The balance loss is a product of two means over tokens, expert load and probability, so it depends
on the split into micro-batches.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.losses.precision import in_float32


@in_float32
def expert_load(experts_Tk: Tensor, num_experts: int, mask_T: Tensor) -> Tensor:
    """Share of the valid tokens' assignments per expert, [E]; the shares sum to one."""
    valid = mask_T[:, None].expand_as(experts_Tk).flatten().float()
    counts = torch.zeros(num_experts, device=experts_Tk.device).index_add(0, experts_Tk.flatten(), valid)
    return counts / counts.sum().clamp_min(1.0)


@in_float32
def balance_loss(logits_TE: Tensor, experts_Tk: Tensor, mask_T: Tensor) -> Tensor:
    """E * sum_e load_e * mean_t p_te over the tokens where mask_T is 1.

    It is 1 if load and mean probability are uniform, and equals E^2 * mean_e(load_e * mean_t p_te). The loads sum to
    one for every k. The load is a count without a gradient; the router's gradient comes from the probabilities p.

    Source: Fedus et al. (Switch Transformers), equation 4; the released Hunyuan-Large code.
    """
    num_experts = logits_TE.shape[-1]
    mask = mask_T.float()
    probabilities = logits_TE.softmax(dim=-1, dtype=torch.float32)
    mean_probability = (probabilities * mask[:, None]).sum(0) / mask.sum().clamp_min(1.0)
    return num_experts * (expert_load(experts_Tk, num_experts, mask_T) * mean_probability).sum()


@in_float32
def router_z_loss(logits_TE: Tensor, mask_T: Tensor) -> Tensor:
    """Mean of (log sum_e exp(logit_e))^2, a penalty that keeps the router's logits small.

    Source: Zoph et al., ST-MoE (arXiv 2202.08906), equation 5.
    """
    return _mean_over(logits_TE.float().logsumexp(dim=-1).square(), mask_T)


@in_float32
def router_entropy(logits_TE: Tensor, mask_T: Tensor) -> Tensor:
    """Mean entropy of the router's distribution in nats, from 0 (one expert has all probability) to log E (uniform)."""
    log_probabilities = logits_TE.log_softmax(dim=-1, dtype=torch.float32)
    return _mean_over(-(log_probabilities.exp() * log_probabilities).sum(-1), mask_T)


def _mean_over(values_T: Tensor, mask_T: Tensor) -> Tensor:
    return (values_T * mask_T).sum() / mask_T.sum().clamp_min(1.0)
