"""Published names of an adopted model's tensors, derived from transformers' own conversions.

transformers stores the experts of most families as stacks and publishes one matrix per expert and projection. Its
conversions are applied, in the direction of saving, to small tensors whose values are their own places. Where a value
comes out tells which part of the parameter the published tensor is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from align.models.experts import Experts
from align.models.family import Place

HALVES = 2


class AdoptedNames:
    """The published names of one configuration's model."""

    def __init__(self, model: Any):
        """model: a language model without weights (on torch's meta device)."""
        self._places: dict[str, Place] = {}
        self._parts: dict[str, list[tuple[str, Place]]] = {}
        stacks = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if isinstance(module, Experts)
            for parameter, _ in module.named_parameters(recurse=False)
        }
        for name, tensor in model.state_dict().items():
            parts = list(_parts(model, name, tensor, stacked=name in stacks))
            self._parts[name] = parts
            self._places |= dict(parts)

    def place(self, published: str) -> Place:
        """The part of a parameter that holds the published tensor; an unknown name is its own place."""
        return self._places.get(published, Place(published))

    def published(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(published name, view) of each published tensor in the parameter or buffer `name`."""
        for published, place in self._parts.get(name, [(name, Place(name))]):
            yield published, place.within(tensor)


def _parts(model: Any, name: str, tensor: Tensor, *, stacked: bool) -> Iterator[tuple[str, Place]]:
    """(published name, part) of each published tensor in the parameter `name`."""
    marked = torch.zeros((1,) * tensor.dim(), dtype=torch.int64)
    if stacked:
        experts = tensor.shape[0]
        marked = torch.arange(HALVES * experts).view(experts, HALVES, *(1,) * (tensor.dim() - 2))
    found: dict[str, Tensor] = revert_weight_conversion(model, {name: marked})
    for published, values in found.items():
        if values.numel() == marked.numel():
            if values.dim() != marked.dim():
                raise NotImplementedError(f"transformers publishes '{name}' with other dimensions")
            yield published, Place(name)
            continue
        expert, half = divmod(int(values.flatten()[0]), HALVES)
        yield published, Place(name, expert, half if values.numel() == 1 else None)
