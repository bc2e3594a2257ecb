"""Sizes and parameter counts of a model, from its configuration alone.

Letters: H query heads, K key/value heads, d head size, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from align.config.parts import Lora

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


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    owns_kv: it has its own key and value projections (otherwise it uses those of an earlier layer).
    attention, norms, router, experts, mlp: parameter counts; `experts` counts all E routed experts, `mlp` the shared
    expert or a dense layer's MLP.
    mlp_width: width of that MLP.
    num_experts, top_k: routed experts, and experts per token.
    """

    owns_kv: bool
    attention: int
    norms: int
    router: int
    experts: int
    mlp: int
    mlp_width: int
    num_experts: int
    top_k: int

    @property
    def parameters(self) -> int:
        return self.attention + self.norms + self.router + self.experts + self.mlp

    @property
    def active(self) -> int:
        """Parameters used for one token."""
        routed = self.experts * self.top_k // self.num_experts if self.experts else 0
        return self.parameters - self.experts + routed


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; all counts are exact."""

    name: str
    vocab_size: int
    hidden_size: int
    expert_width: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qk_norm: bool
    max_length: int
    layers: tuple[LayerShape, ...]

    @property
    def query_size(self) -> int:
        """H * d."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """K * d."""
        return self.kv_heads * self.head_dim

    @cached_property
    def kinds(self) -> tuple[tuple[LayerShape, int], ...]:
        """Distinct layers with their counts, so that arithmetic over layers does not grow with depth."""
        return tuple(Counter(self.layers).items())

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @cached_property
    def experts(self) -> int:
        """Parameters of all routed experts."""
        return sum(count * layer.experts for layer, count in self.kinds)

    @cached_property
    def trunk(self) -> int:
        """Parameters without head: embedding, layers, final norm."""
        return self.embedding + self.hidden_size + sum(count * layer.parameters for layer, count in self.kinds)

    def parameters(self, *, scorer: bool = False) -> int:
        """All parameters, with the vocabulary head (shared with the embedding if tied) or a scorer's scalar head."""
        head = self.hidden_size if scorer else 0 if self.tied else self.embedding
        return self.trunk + head

    @cached_property
    def active(self) -> int:
        """Parameters used for one token. Embedding and head count in full, as in `align show-model`."""
        inactive = sum(count * (layer.parameters - layer.active) for layer, count in self.kinds)
        return self.parameters() - inactive

    @cached_property
    def largest_layer(self) -> LayerShape:
        return max(self.layers, key=lambda layer: layer.parameters)

    def cache_bytes(self, bytes_per_value: int = 2) -> int:
        """Bytes of key/value cache per token, over all layers. Layers without own keys and values need none."""
        owners = sum(count for layer, count in self.kinds if layer.owns_kv)
        return 2 * owners * self.kv_size * bytes_per_value

    def forward_flops(self, length: int, *, scorer: bool = False) -> float:
        """Multiplications and additions of the forward pass, per token of a sequence of `length` tokens.

        Two per matrix parameter, plus causal attention over `length` / 2 earlier tokens on average.
        """
        vectors = self.hidden_size + sum(count * layer.norms for layer, count in self.kinds)
        layers = self.active - vectors - self.embedding * (1 if self.tied else 2)
        head = self.hidden_size if scorer else self.embedding
        return 2 * (layers + head) + 4 * len(self.layers) * self.query_size * length / 2

    def adapters(self, lora: Lora) -> tuple[int, int]:
        """(trained parameters in routed experts, all other trained parameters, including those of the router)."""
        inside, outside = 0, 0
        hidden, rank = self.hidden_size, lora.rank
        for layer, count in self.kinds:
            if lora.attention:
                outputs = [self.query_size] + [self.kv_size] * 2 * layer.owns_kv
                outside += count * rank * (sum(hidden + size for size in outputs) + self.query_size + hidden)
            if lora.shared_mlp:
                outside += count * 3 * rank * (hidden + layer.mlp_width) * bool(layer.mlp)
            if lora.experts and layer.experts:
                gate_up = hidden + 2 * self.expert_width
                down = self.expert_width + hidden
                inside += count * layer.num_experts * rank * (gate_up + down)
            if lora.train_router:
                outside += count * layer.router
        return inside, outside


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Read a model's shape from the values of its config.json."""
    values = {**DEFAULTS, **{key: value for key, value in config.items() if key in DEFAULTS}}
    head_dim = values["attention_head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    group = values["cla_share_factor"] if values["use_cla"] else 1
    return ModelShape(
        name=name,
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        expert_width=values["intermediate_size"],
        heads=values["num_attention_heads"],
        kv_heads=values["num_key_value_heads"],
        head_dim=head_dim,
        tied=values["tie_word_embeddings"],
        qk_norm=values["use_qk_norm"],
        max_length=values["max_position_embeddings"],
        layers=tuple(_layer(values, head_dim, index, group) for index in range(values["num_hidden_layers"])),
    )


def _layer(values: dict[str, Any], head_dim: int, index: int, group: int) -> LayerShape:
    hidden, width = values["hidden_size"], values["intermediate_size"]
    query, kv = values["num_attention_heads"] * head_dim, values["num_key_value_heads"] * head_dim
    owns = index % group == 0
    attention = 2 * hidden * query + 2 * hidden * kv * owns
    if values["attention_bias"]:
        attention += query + hidden + 2 * kv * owns
    experts = _of_layer(values["num_experts"], index)
    routed = experts > 1
    shared = width * _of_layer(values["num_shared_expert"], index) if values["use_mixed_mlp_moe"] else 0
    mlp_width = shared if routed else width
    bias = (2 * mlp_width + hidden if mlp_width else 0) if values["mlp_bias"] else 0
    return LayerShape(
        owns_kv=owns,
        attention=attention,
        norms=2 * hidden + 2 * head_dim * values["use_qk_norm"],
        router=experts * hidden if routed else 0,
        experts=experts * 3 * hidden * width if routed else 0,
        mlp=3 * hidden * mlp_width + bias,
        mlp_width=mlp_width,
        num_experts=experts,
        top_k=_of_layer(values["moe_topk"], index) if routed else 1,
    )


def _of_layer(value: int | list[int], index: int) -> int:
    return value[index] if isinstance(value, list) else value


def expert_counts(config: Mapping[str, Any]) -> list[int]:
    """Distinct numbers of experts per layer in a config.json; values that are not integers are skipped."""
    experts = config.get("num_experts", DEFAULTS["num_experts"])
    layers = config.get("num_hidden_layers", DEFAULTS["num_hidden_layers"])
    listed = experts[: layers if isinstance(layers, int) else None] if isinstance(experts, list) else [experts]
    return [count for count in dict.fromkeys(listed) if isinstance(count, int)]
