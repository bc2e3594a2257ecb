"""Sizes of a model from its configuration: `shape_of`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from align.config.presets import DEFAULT_FAMILY
from align.plan.hunyuan import DEFAULTS, hunyuan_shape
from align.plan.sizes import ModelShape

ARITHMETIC: dict[str, Callable[[str, Mapping[str, Any]], ModelShape]] = {DEFAULT_FAMILY: hunyuan_shape}
"""Families whose sizes are computed without torch, by `model_type`."""
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names that the configurations of different families use for the number of routed experts."""


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Sizes of the model that the values of a config.json describe. Only families outside `ARITHMETIC` load torch."""
    arithmetic = ARITHMETIC.get(config.get("model_type", DEFAULT_FAMILY))
    if arithmetic is None:
        from align.plan.counted import counted_shape  # imports torch and transformers

        arithmetic = counted_shape
    return arithmetic(name, config)


def expert_counts(config: Mapping[str, Any]) -> list[int]:
    """Distinct numbers of experts per layer in a config.json; values that are not integers are skipped."""
    defaults = DEFAULTS if config.get("model_type", DEFAULT_FAMILY) == DEFAULT_FAMILY else {}
    experts = next((config[key] for key in EXPERT_KEYS if key in config), defaults.get("num_experts"))
    layers = config.get("num_hidden_layers", defaults.get("num_hidden_layers"))
    listed = experts[: layers if isinstance(layers, int) else None] if isinstance(experts, list) else [experts]
    return [count for count in dict.fromkeys(listed) if isinstance(count, int)]
