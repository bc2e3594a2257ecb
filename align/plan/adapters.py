"""Trained parameters of a model with adapters, counted on torch's meta device, which takes no memory."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch

from align.config.lora import Lora
from align.config.presets import DEFAULT_FAMILY
from align.models.family import family
from align.models.lora.adapters import add_lora
from align.models.lora.describe import trained_rows


@lru_cache(maxsize=64)
def counted_groups(config: str, lora: Lora, *, scorer: bool) -> dict[str, int]:
    """Trained parameters of each group that has any, without a scorer's head.

    Raises `UserError` for a name in the settings that no module has.

    config: values of the model's config.json, as JSON.
    """
    values: dict[str, Any] = json.loads(config)
    known = family(values.pop("model_type", DEFAULT_FAMILY))
    described = known.config(**values)
    with torch.device("meta"):
        model: Any = (known.scorer if scorer else known.policy)(described)
    model.tie_weights()
    wrapped = add_lora(model, lora, task="SEQ_CLS" if scorer else "CAUSAL_LM")
    rows = trained_rows(wrapped, lambda parameter: tuple(parameter.shape))
    return {row.group: row.parameters for row in rows if row.group != "score"}
