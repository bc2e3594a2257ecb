"""Maps between the names of the published checkpoint, of our parameters and of the vLLM model's parameters.

Published: one matrix per expert (`mlp.experts.E.gate_proj.weight`), router `mlp.gate.wg.weight`.
Ours: experts stacked (`mlp.experts.gate_up_proj` [E, 2F, D], `mlp.experts.down_proj` [E, D, F]), router
`mlp.gate.weight`.
vLLM: experts stacked as `mlp.experts.w13` and `w2`; q/k/v and gate/up projections merged; router as published.
All other names are equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from align.models.family import Place

if TYPE_CHECKING:
    from align.models.hunyuan.configuration import HunYuanConfig

STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The published matrices of one expert in each of our stacks, in order along the stack's second dimension."""
VLLM_STACKS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
"""The same for the stacks of the vLLM model."""
VLLM_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The published projections in each merged linear layer of the vLLM model."""
ROUTER, PUBLISHED_ROUTER = ".mlp.gate.weight", ".mlp.gate.wg.weight"

_EXPERT = re.compile(r"(?P<stem>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<projection>(?:gate|up|down)_proj)\.weight")
_LAYER = re.compile(r"layers\.(\d+)\.")


def place(published: str) -> Place:
    """The part of our parameters that holds the tensor with this published name."""
    found = _EXPERT.fullmatch(published)
    if found is None:
        if published.endswith(PUBLISHED_ROUTER):
            return Place(published.removesuffix(PUBLISHED_ROUTER) + ROUTER)
        return Place(published)
    for stack, projections in STACKS.items():
        if found["projection"] in projections:
            half = projections.index(found["projection"]) if len(projections) > 1 else None
            return Place(f"{found['stem']}.{stack}", int(found["expert"]), half)
    raise AssertionError(published)


def published(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(published name, view) of each published tensor in our parameter `name`, the inverse of `place`."""
    stem, _, stack = name.rpartition(".")
    if stem.endswith(".mlp.experts"):
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(len(STACKS[stack]))
            for projection, part in zip(STACKS[stack], parts, strict=True):
                yield f"{stem}.{expert}.{projection}.weight", part
    elif name.endswith(ROUTER):
        yield name.removesuffix(ROUTER) + PUBLISHED_ROUTER, tensor
    else:
        yield name, tensor


class VllmPlace(NamedTuple):
    """The part of a vLLM parameter that holds a published tensor.

    parameter: name of the vLLM parameter.
    projection: the published projection inside a stack or a merged layer, otherwise empty.
    expert: index into a stack, otherwise None.
    shard: name or number of the projection for the weight loader of a merged layer, otherwise None.
    """

    parameter: str
    projection: str = ""
    expert: int | None = None
    shard: str | int | None = None


def vllm_place(published: str, config: HunYuanConfig) -> VllmPlace:
    """The part of the vLLM model that holds the tensor with this published name."""
    if found := _EXPERT.fullmatch(published):
        (stack,) = (stack for stack, projections in VLLM_STACKS.items() if found["projection"] in projections)
        return VllmPlace(f"{found['stem']}.{stack}", found["projection"], int(found["expert"]))
    module, _, leaf = published.rpartition(".")
    parent, _, projection = module.rpartition(".")
    if projection in VLLM_MERGED["qkv_proj"] and config.kv_owner(layer := layer_of(module)) == layer:
        return VllmPlace(f"{parent}.qkv_proj.{leaf}", projection, shard=projection[0])
    if projection in VLLM_MERGED["gate_up_proj"]:
        return VllmPlace(
            f"{parent}.gate_up_proj.{leaf}", projection, shard=VLLM_MERGED["gate_up_proj"].index(projection)
        )
    return VllmPlace(published)


def vllm_pieces(parameter: str, experts: int) -> int:
    """Number of published tensors in a vLLM parameter. experts: size of its first dimension, used only for a stack."""
    stem, _, last = parameter.rpartition(".")
    if stem.endswith(".mlp.experts"):
        return experts * len(VLLM_STACKS[last])
    return len(VLLM_MERGED.get(stem.rpartition(".")[2], ("itself",)))


def layer_of(name: str) -> int:
    """Index of the layer that a parameter or module belongs to; raises `ValueError` if there is none."""
    found = _LAYER.search(name + ".")
    if found is None:
        raise ValueError(f"'{name}' is not part of a layer")
    return int(found[1])


def published_shapes(config: HunYuanConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the language model in the published layout."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def mlp(name: str, width: int, bias: bool) -> None:
        linear(f"{name}.gate_proj", width, hidden, bias)
        linear(f"{name}.up_proj", width, hidden, bias)
        linear(f"{name}.down_proj", hidden, width, bias)

    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if config.use_qk_norm:
            norms = ("query_layernorm", "key_layernorm")
            shapes |= {f"{block}.self_attn.{norm}.weight": (config.head_dim,) for norm in norms}
        linear(f"{block}.self_attn.q_proj", heads, hidden, config.attention_bias)
        linear(f"{block}.self_attn.o_proj", hidden, heads, config.attention_bias)
        if config.kv_owner(layer) == layer:
            linear(f"{block}.self_attn.k_proj", kv, hidden, config.attention_bias)
            linear(f"{block}.self_attn.v_proj", kv, hidden, config.attention_bias)
        experts = config.experts_in(layer)
        if experts == 1:
            mlp(f"{block}.mlp", config.intermediate_size, config.mlp_bias)
            continue
        shapes[f"{block}{PUBLISHED_ROUTER}"] = (experts, hidden)
        for expert in range(experts):
            mlp(f"{block}.mlp.experts.{expert}", config.intermediate_size, False)
        if width := config.shared_width(layer):
            mlp(f"{block}.mlp.shared_mlp", width, config.mlp_bias)
    return shapes
