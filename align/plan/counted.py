"""Sizes of a model of any family, counted on a model of torch's meta device, which takes no memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from align.errors import UserError
from align.models.adopted.routing import ReportingRouter
from align.models.family import family, family_of, model_types
from align.models.lora.adapters import AnyModel
from align.plan.sizes import LayerShape, Linears, ModelShape
from align.plan.traced import TracedActivations, mixes

ROUTERS = {"gate", "router"}
"""Names of the modules that choose experts."""
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""{kind of attention in `layer_types`: key of the configuration with its window}."""


def counted_shape(name: str, values: Mapping[str, Any]) -> ModelShape:
    """Count the model that the values of a config.json describe."""
    model_type = values["model_type"]
    if model_type not in model_types():
        raise UserError(
            f"{name}: its model_type is '{model_type}', which align does not know; docs/families.md lists the model "
            "types."
        )
    config = family(model_type).config(**values)
    model = meta_model(config)
    layers = tuple(_layer(config, index, layer) for index, layer in enumerate(model.model.layers))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    everything = sum(parameter.numel() for parameter in model.parameters())
    own_head = sum(parameter.numel() for parameter in head.parameters() if parameter is not embedding)
    inside = sum(layer.parameters for layer in layers)
    described = json.dumps(config.to_dict(), default=str)
    return ModelShape(
        name=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        embedding=embedding.numel(),
        head=own_head,
        outside=everything - embedding.numel() - own_head - inside,
        heads=config.num_attention_heads,
        max_length=config.max_position_embeddings,
        keeps_kv=False,
        layers=layers,
        activations=TracedActivations(described, config.hidden_size, layers),
        config=described,
    )


def meta_model(config: Any) -> AnyModel:
    """A policy whose weights have shapes but no memory."""
    with torch.device("meta"):
        model: AnyModel = family_of(config).policy(config)
    model.tie_weights()
    return model


def _layer(config: Any, index: int, layer: nn.Module) -> LayerShape:
    stack = next((module for module in layer.modules() if _matrices(module)), None)
    matrices = _matrices(stack)
    counts = dict.fromkeys(("attention", "norms", "router", "experts", "mlp"), 0)
    for name, parameter in layer.named_parameters():
        counts[_part(name, parameter, stack)] += parameter.numel()
    mixing = [linear for name, linear in _linears(layer) if mixes(name)]
    others = [linear for name, linear in _linears(layer) if not mixes(name)]
    cache, score_width = _attention_sizes(config, layer)
    hidden = config.hidden_size
    return LayerShape(
        **counts,
        mlp_width=max((linear.in_features for linear in others if linear.out_features == hidden), default=0),
        expert_width=min((matrix[0].numel() // hidden for matrix in matrices), default=0),
        num_experts=len(matrices[0]) if matrices else 1,
        top_k=next((router.top_k for router in layer.modules() if isinstance(router, ReportingRouter)), 1),
        cache=cache,
        score_width=score_width,
        window=_window(config, index),
        linears=Linears(
            attention=_inputs_and_outputs(mixing),
            mlp=_inputs_and_outputs(linear for linear in others if linear.out_features > 1),
            experts=sum(len(matrix) * sum(matrix.shape[1:]) for matrix in matrices),
        ),
    )


def _matrices(stack: nn.Module | None) -> list[nn.Parameter]:
    """Stacked matrices [experts, ., .] of a module; convolutions also have three dimensions."""
    if stack is None or isinstance(stack, nn.Conv1d):
        return []
    return [parameter for parameter in stack.parameters(recurse=False) if parameter.ndim == 3]


def _part(name: str, parameter: nn.Parameter, stack: nn.Module | None) -> str:
    """The count of `LayerShape` to which a parameter of a layer belongs."""
    if stack is not None and any(parameter is one for one in stack.parameters(recurse=False)):
        return "experts"
    if ROUTERS & set(name.split(".")) and parameter.requires_grad:  # a correction bias is not trained
        return "router"
    if parameter.ndim < 2 or not parameter.requires_grad:
        return "norms"
    return "attention" if mixes(name) else "mlp"


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers without those of routers."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and not ROUTERS & set(name.split(".")):
            yield name, module


def _inputs_and_outputs(linears: Iterable[nn.Linear]) -> int:
    return sum(linear.in_features + linear.out_features for linear in linears)


def _attention_sizes(config: Any, layer: nn.Module) -> tuple[int, int]:
    """(values of cache per token, head sizes of keys and values summed over query heads); zeros for a convolution."""
    attention: AnyModel = next(module for name, module in layer.named_children() if mixes(name))
    heads: int = config.num_attention_heads
    if hasattr(attention, "kv_lora_rank"):
        # Multi-head latent attention caches the latent and one rotary key for all heads.
        cache: int = attention.kv_lora_rank + attention.qk_rope_head_dim
        return cache, heads * (attention.qk_head_dim + attention.v_head_dim)
    if not hasattr(attention, "head_dim"):
        return 0, 0
    size: int = attention.head_dim
    keys: int = attention.k_proj.out_features if hasattr(attention, "k_proj") else config.num_key_value_heads * size
    return 0 if getattr(attention, "is_kv_shared_layer", False) else 2 * keys, 2 * heads * size


def _window(config: Any, index: int) -> int | None:
    """Window of a layer's attention; None without a limit."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        window: int | None = getattr(config, "sliding_window", None)
        return window
    return getattr(config, WINDOWS[kinds[index]], None) if kinds[index] in WINDOWS else None
