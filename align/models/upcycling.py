"""Convert a dense Qwen3 model to a Qwen3-MoE model that computes the same function.

Every routed expert is a copy of the dense MLP, and a token's combine weights sum to one. The router's weights are
random, so experts receive different tokens and diverge in training (sparse upcycling, arXiv 2212.05055).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from align.errors import UserError
from align.models.family import family

SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Keys with the same meaning in both configurations."""


def upcycle(dense: PreTrainedModel, *, experts: int, top_k: int, expert_width: int | None, seed: int) -> Any:
    """Mixture of experts that computes the same function as the Qwen3 model `dense`."""
    source = dense.config
    assert isinstance(source, Qwen3Config)
    if top_k < 2:
        raise UserError(
            f"top_k {top_k}: Qwen3-MoE normalises the weights of a token's experts, so with one expert the router has "
            "no gradient; set top_k to 2 or more (model.top_k in a recipe, --top-k on the command line)."
        )
    if expert_width not in (None, source.intermediate_size):
        raise UserError(
            f"expert_width {expert_width}: an expert of Qwen3-MoE is a copy of the dense MLP, whose width is "
            f"{source.intermediate_size}; remove expert_width."
        )
    if "sliding_attention" in (source.layer_types or []):
        raise UserError("hot start does not support sliding windows; use a model with use_sliding_window: false.")
    config = Qwen3MoeConfig(
        **{key: getattr(source, key) for key in SHARED_KEYS},
        moe_intermediate_size=source.intermediate_size,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    model: Any = family("qwen3_moe").policy(config)
    model.to(dense.dtype)
    weights = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(".mlp." in name for name in missing), missing
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, dense_layer in zip(model.model.layers, dense.model.layers, strict=True):
            mlp, moe = dense_layer.mlp, layer.mlp
            moe.experts.gate_up_proj.copy_(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
            moe.experts.down_proj.copy_(mlp.down_proj.weight)
            shape = moe.gate.weight.shape
            moe.gate.weight.copy_(torch.randn(shape, generator=generator) * config.initializer_range)
    model.generation_config = dense.generation_config
    return model.eval()
