"""Configuration of the Hunyuan-Large family, with the keys of Tencent's published config.json."""

from __future__ import annotations

from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

Number = TypeVar("Number", int, float)


@strict
class HunYuanConfig(PreTrainedConfig):
    """Sizes and switches of a HunYuan model; unknown keys are kept and saved again.

    use_cla, cla_share_factor: layer i has keys and values if `i % cla_share_factor == 0`; the other layers of its group
        use them.
    use_qk_norm: RMSNorm over the head dimension of queries and keys, after RoPE.
    rope_scaling: `{"type": "dynamic", "alpha": a}` raises the RoPE base to `theta * a ** (d / (d - 2))`, with head
        size d, at every sequence length.
    rope_inv_freq_dtype: dtype to which the inverse frequencies are rounded. Default, as in the released code: bfloat16,
        or float32 (no rounding) if `rope_scaling` has an alpha. Models converted from other families set float32.
    num_experts, moe_topk: an integer, or one per layer; one expert means a dense layer.
    use_mixed_mlp_moe, num_shared_expert: a shared expert of width `intermediate_size * num_shared_expert`.
    router_aux_loss_coef, router_z_loss_coef: weights of the balance loss and the z-loss in the training loss.
    moe_drop_tokens, capacity_factor: in training each of E experts takes at most ceil(capacity_factor * k * T / E)
        assignments of T tokens to k experts each.
    moe_random_routing_dropped_token: recycle routing. An assignment over the capacity goes to a random expert with a
        free slot, if any, instead of being dropped.

    Source: the released configuration files and Sun et al., Hunyuan-Large (arXiv 2411.02265).
    """

    model_type = "hunyuan"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 129024
    hidden_size: int = 6400
    intermediate_size: int = 18304
    num_hidden_layers: int = 64
    num_attention_heads: int = 80
    num_key_value_heads: int = 8
    attention_head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_inv_freq_dtype: str | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    use_qk_norm: bool = True
    use_cla: bool = True
    cla_share_factor: int = 2
    num_experts: int | list[int] = 16
    moe_topk: int | list[int] = 1
    use_mixed_mlp_moe: bool = True
    num_shared_expert: int | list[int] = 1
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    capacity_factor: float | list[float] = 1.0
    moe_drop_tokens: bool = False
    moe_random_routing_dropped_token: bool = False
    output_router_logits: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_group_size(self) -> int:
        """Number of consecutive layers that share one key/value cache."""
        return self.cla_share_factor if self.use_cla else 1

    def kv_owner(self, layer: int) -> int:
        """Layer whose keys and values `layer` attends to."""
        return layer - layer % self.kv_group_size

    def experts_in(self, layer: int) -> int:
        return _per_layer(self.num_experts, layer)

    def top_k_in(self, layer: int) -> int:
        return _per_layer(self.moe_topk, layer)

    def capacity_factor_in(self, layer: int) -> float:
        return _per_layer(self.capacity_factor, layer)

    def shared_width(self, layer: int) -> int:
        """Intermediate size of the shared expert; 0 without a shared expert."""
        return self.intermediate_size * _per_layer(self.num_shared_expert, layer) if self.use_mixed_mlp_moe else 0

    def rope_base(self) -> float:
        """RoPE base after NTK-alpha scaling."""
        alpha: float | None = (self.rope_scaling or {}).get("alpha")
        if not alpha:
            return self.rope_theta
        return self.rope_theta * float(alpha ** (self.head_dim / (self.head_dim - 2)))


def _per_layer(value: Number | list[Number], layer: int) -> Number:
    return value[layer] if isinstance(value, list) else value


def size_problem(config: HunYuanConfig) -> str | None:
    """The reason why a model of these sizes cannot be built; None if it can be."""
    for name in ("num_experts", "moe_topk", "num_shared_expert", "capacity_factor"):
        values = getattr(config, name)
        if isinstance(values, list) and len(values) < config.num_hidden_layers:
            return f"{name} has {len(values)} values for {config.num_hidden_layers} layers"
    for layer in range(config.num_hidden_layers):
        if config.top_k_in(layer) > config.experts_in(layer):
            return f"moe_topk is {config.top_k_in(layer)}, but there are only {config.experts_in(layer)} experts"
    if config.num_attention_heads % config.num_key_value_heads:
        heads = f"num_attention_heads {config.num_attention_heads}"
        return f"num_key_value_heads {config.num_key_value_heads} does not divide {heads}"
    if config.attention_head_dim is None and config.hidden_size % config.num_attention_heads:
        return f"num_attention_heads {config.num_attention_heads} does not divide hidden_size {config.hidden_size}"
    return None
