"""Sizes of HunYuan models from their configuration alone, without torch, and the activations that they save.

Letters: H query heads, K key/value heads, d head size, E experts, a bytes per activation value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import UserError
from align.plan.activations import Pass, mlp_bytes, routed_bytes
from align.plan.sizes import LayerShape, Linears, ModelShape, Saved

DEFAULTS: dict[str, Any] = {
    "vocab_size": 129_024,
    "hidden_size": 6400,
    "intermediate_size": 18_304,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "attention_head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
    "use_qk_norm": True,
    "use_cla": True,
    "cla_share_factor": 2,
    "num_experts": 16,
    "moe_topk": 1,
    "use_mixed_mlp_moe": True,
    "num_shared_expert": 1,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}
"""Defaults of `HunYuanConfig` for keys missing in a config.json, repeated here to avoid importing transformers."""


def hunyuan_shape(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Read a model's shape from the values of its config.json."""
    values = {**DEFAULTS, **{key: value for key, value in config.items() if key in DEFAULTS}}
    heads, kv_heads, hidden = values["num_attention_heads"], values["num_key_value_heads"], values["hidden_size"]
    head_dim = values["attention_head_dim"] or hidden // heads
    group = values["cla_share_factor"] if values["use_cla"] else 1
    embedding = values["vocab_size"] * hidden
    return ModelShape(
        name=name,
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        embedding=embedding,
        head=0 if values["tie_word_embeddings"] else embedding,
        outside=hidden,
        heads=heads,
        max_length=values["max_position_embeddings"],
        keeps_kv=True,
        layers=tuple(_layer(values, head_dim, index, group) for index in range(values["num_hidden_layers"])),
        activations=HunYuanActivations(hidden, heads, kv_heads, head_dim, values["use_qk_norm"]),
        config=json.dumps(dict(config), default=str),
    )


def _layer(values: dict[str, Any], head_dim: int, index: int, group: int) -> LayerShape:
    hidden, width = values["hidden_size"], values["intermediate_size"]
    query, kv = values["num_attention_heads"] * head_dim, values["num_key_value_heads"] * head_dim
    owns = index % group == 0
    outputs = [query] + [kv] * 2 * owns
    attention = sum(hidden * size for size in outputs) + query * hidden
    if values["attention_bias"]:
        attention += sum(outputs) + hidden
    experts = of_layer(values, "num_experts", index)
    routed = experts > 1
    shared = width * of_layer(values, "num_shared_expert", index) if values["use_mixed_mlp_moe"] else 0
    mlp_width = shared if routed else width
    bias = (2 * mlp_width + hidden if mlp_width else 0) if values["mlp_bias"] else 0
    return LayerShape(
        attention=attention,
        norms=2 * hidden + 2 * head_dim * values["use_qk_norm"],
        router=experts * hidden if routed else 0,
        experts=experts * 3 * hidden * width if routed else 0,
        mlp=3 * hidden * mlp_width + bias,
        mlp_width=mlp_width,
        expert_width=width if routed else 0,
        num_experts=experts,
        top_k=of_layer(values, "moe_topk", index) if routed else 1,
        cache=2 * kv * owns,
        score_width=2 * query,
        window=None,
        linears=Linears(
            attention=sum(hidden + size for size in outputs) + query + hidden,
            mlp=3 * (hidden + mlp_width) * bool(mlp_width),
            experts=experts * (hidden + 2 * width + width + hidden) if routed else 0,
        ),
    )


def of_layer(values: Mapping[str, Any], key: str, index: int) -> int:
    """The value of a key for one layer. It is one number for all layers, or a list with one number per layer."""
    value = values[key]
    if isinstance(value, list) and index >= len(value):
        raise UserError(f"config.{key}: it has {len(value)} values, but the model has more layers; give one per layer.")
    return int(value[index] if isinstance(value, list) else value)


@dataclass(frozen=True)
class HunYuanActivations:
    """Activations of `align.models.hunyuan`, counted operation by operation."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool

    def layer(self, layer: LayerShape, run: Pass) -> Saved:
        trained = run.lora is None or run.lora.shared_mlp
        mlp = mlp_bytes(layer.mlp_width, run.bytes_per_value, trained=trained)
        experts = routed_bytes(self.hidden_size, layer, run) + self._router(layer, run)
        rest = 2 * self._norm(run) + self._attention(layer, run) + _adapters(layer, run)
        return Saved(rest, experts + mlp)

    def outside(self, run: Pass) -> float:
        return self._norm(run)

    def _norm(self, run: Pass) -> int:
        """Bytes per token that an RMSNorm with fp32 weights saves: input, 1 / rms(x) and output.

        With bf16 weights, x / rms(x) in fp32 is saved instead of the input, and also in bf16 if the weight is trained.
        """
        a = run.bytes_per_value
        rounded = a if run.bytes_per_weight < 4 and not run.lora else 0
        return (4 + rounded + a) * self.hidden_size + 4

    def _attention(self, layer: LayerShape, run: Pass) -> int:
        """Bytes per token: queries, output, log-sum-exp, and the keys and values that the layer owns.

        For pairs and short sequences attention saves copies of the keys and values in every layer. A padded output is
        saved beside the output without padding. The code for short sequences saves its weights instead of output and
        log-sum-exp.

        Rotary embeddings save nothing. With QK norm, the normalised queries and keys are saved in fp32, in addition
        to the values that attention uses. With a mask, every layer saves its keys and values repeated for all query
        heads, and the mask in the dtype of the activations.
        """
        a, query, kv = run.bytes_per_value, self.heads * self.head_dim, self.kv_heads * self.head_dim
        rounded = a if a < 4 else 0
        owns, copied = bool(layer.cache), run.pairs or run.short
        queries = (4 + (0 if run.lora else rounded) + a if self.qk_norm else a) * query
        values = 0 if run.padded else (rounded if self.qk_norm and not copied else a) + a
        keys_and_values = (4 * self.qk_norm * owns + values * (owns or copied)) * kv
        repeated = 2 * a * query + a * run.length if run.padded else 0
        norms = 4 * (self.heads + self.kv_heads * owns) if self.qk_norm else 0
        outputs = a * query * (2 if run.pairs and not run.short else 1)
        per_head = a * run.length if run.short else 4
        return queries + keys_and_values + repeated + outputs + per_head * self.heads + norms

    def _router(self, layer: LayerShape, run: Pass) -> int:
        """Bytes per token: the hidden state in fp32, three values per expert, and the chosen experts."""
        if not layer.experts:
            return 0
        return (4 * self.hidden_size if run.bytes_per_value < 4 else 0) + 3 * 4 * layer.num_experts + 32 * layer.top_k


def _adapters(layer: LayerShape, run: Pass) -> int:
    """Bytes per token that adapters on attention and MLP save: the `rank` outputs of each A matrix."""
    if run.lora is None:
        return 0
    attention = (2 + 2 * bool(layer.cache)) * run.lora.attention * run.lora.rank_of("attention")
    mlp = 3 * bool(layer.mlp_width) * run.lora.shared_mlp * run.lora.rank_of("shared_expert")
    return (attention + mlp) * run.bytes_per_value
