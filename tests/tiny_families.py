"""Tiny random models of transformers' causal language model families.

Every value that transformers initialises to a constant (norms, biases, correction biases, sinks) is randomised, so that
a weight which is lost or replaced by its default changes the logits.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
# vLLM's attention on a CPU needs heads of at least 32. Without a key head_dim, two heads of 32 fill the hidden size.
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None}
TWO_KEY_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": None}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
TOP_2 = {"num_experts_per_tok": 2}
MOE = {**TOP_2, "moe_intermediate_size": 32}
GROUPS = {"n_group": 1, "topk_group": 1}
ROUTED = {**MOE, **GROUPS, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
# vLLM's MLA kernels need a latent of 512 + 64.
MLA = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
GRANITE = {
    **TWO_HEADS,
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": TWO_HEADS,
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "ministral3": {},
    "phi3": TWO_HEADS,
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {
        **WINDOWS,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {**WINDOWS, "tie_word_embeddings": True},
    "gemma4_text": {**WINDOWS, "tie_word_embeddings": True, "global_head_dim": 32, "hidden_size_per_layer_input": 0},
    "granite": GRANITE,
    "smollm3": {**TWO_HEADS, "no_rope_layers": [1, 1, 0], "no_rope_layer_interval": 3},
    "seed_oss": {},
    "olmo2": TWO_KEY_HEADS,
    "olmo3": {**TWO_KEY_HEADS, **WINDOWS},
    "exaone4": WINDOWS,
    "glm4": {},
    "ernie4_5": {"use_bias": False},
    "cohere2": {**TWO_HEADS, **WINDOWS, "tie_word_embeddings": True, "sliding_window": 512},
    "apertus": TWO_HEADS,
    "arcee": {},
    "starcoder2": TWO_HEADS,
    "lfm2": {
        **TWO_HEADS,
        "block_ff_dim": 128,
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": True,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "hunyuan_v1_dense": {},
    "qwen2_moe": {**TWO_HEADS, **MOE, "shared_expert_intermediate_size": 64, "num_experts": 8},
    "qwen3_moe": {**MOE, "num_experts": 8, "norm_topk_prob": True},
    "mixtral": {**TOP_2, "intermediate_size": 64, "num_local_experts": 8, "sliding_window": None},
    "olmoe": {**TWO_KEY_HEADS, **TOP_2, "intermediate_size": 64, "num_experts": 8},
    "granitemoe": {**GRANITE, **TOP_2, "intermediate_size": 64, "num_local_experts": 8},
    "granitemoeshared": {
        **GRANITE,
        **TOP_2,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "shared_intermediate_size": 64,
    },
    "ernie4_5_moe": {
        **TWO_HEADS,
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
        "use_bias": False,
    },
    "dots1": {**ROUTED, "routed_scaling_factor": 2.0},
    "solar_open": {**MOE, **GROUPS, "n_routed_experts": 8, "n_shared_experts": 1, "routed_scaling_factor": 2.0},
    "flex_olmo": {**TWO_KEY_HEADS, **TOP_2, "intermediate_size": 64, "num_experts": 8},
    "mellum": {**MOE, "num_experts": 8},
    "glm4_moe": ROUTED,
    "glm4_moe_lite": {**ROUTED, **MLA, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "exaone_moe": {
        **MOE,
        **WINDOWS,
        "num_experts": 8,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        **GROUPS,
    },
    "afmoe": {
        **MOE,
        **WINDOWS,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        **GROUPS,
    },
    "minimax_m2": {**TOP_2, "intermediate_size": 64, "num_local_experts": 8, "rotary_dim": 16},
    "lfm2_moe": {
        **TWO_HEADS,
        **MOE,
        "num_experts": 8,
        "tie_word_embeddings": True,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "llama4_text": {
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 64,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 1, 0],
    },
    "hunyuan_v1_moe": {"intermediate_size": 64, "num_experts": 8, "moe_topk": 2},
    "hy_v3": {**MOE, "num_experts": 8, "num_shared_experts": 1},
    "deepseek_v2": {
        **ROUTED,
        **MLA,
        "q_lora_rank": None,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "deepseek_v3": {**ROUTED, **MLA, "n_group": 2, "topk_method": "noaux_tc"},
    "gpt_oss": {**WINDOWS, **TOP_2, "intermediate_size": 64, "num_local_experts": 8},
}
"""Configuration values by `model_type`, beside those of `SHARED`; None removes a shared value."""


WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "block_ff_dim",
    "q_lora_rank",
    "num_attention_heads",
    "num_key_value_heads",
)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Configuration of three layers with hidden size 64; mixtures have eight experts, two per token."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = deepcopy({**SHARED, **FAMILIES[model_type], **changes})  # some classes change the lists they are given
    kept = {name: value for name, value in values.items() if value is not None or name not in SHARED}
    return CONFIG_MAPPING[model_type](**kept)


def wide_config(model_type: str) -> Any:
    """The tiny configuration with widths and heads times four. Memory is then mostly that of matrices and rows.

    On a CPU, attention stores its weights if it has dropout, or values of another size than keys; on a GPU it does not.
    """
    values = {**SHARED, **FAMILIES[model_type]}
    changes = {name: 4 * values[name] for name in WIDTHS if values.get(name)}
    if "v_head_dim" in values:
        changes["v_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    return tiny_config(model_type, **changes, attention_dropout=0.0)


def tiny_model(model_type: str, seed: int = 0, attention: str = "sdpa", **changes: Any) -> Any:
    """Random model of transformers' own class, float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    if getattr(config, "attn_logit_softcapping", None):
        attention = "eager"  # transformers' other attention drops the soft cap
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    except ValueError:  # the family has no such attention (gpt_oss has sinks)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model, seed + 1)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Add noise of scale 0.1 to vectors, to constant parameters and to the routers' correction biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bias = name.endswith(("correction_bias", "expert_bias"))
        constant = isinstance(tensor, torch.nn.Parameter) and (tensor.dim() == 1 or float(tensor.std()) == 0)
        if tensor.is_floating_point() and (bias or constant):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


def save_tiny(model_type: str, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Save a `tiny_model` in `folder` and return it. The folder has no tokenizer."""
    model = tiny_model(model_type, seed, **changes)
    model.save_pretrained(folder)
    return model
