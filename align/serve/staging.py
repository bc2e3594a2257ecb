"""Check adapters and write the copies that vLLM loads.

vLLM itself takes adapters of another hidden size, number of layers or number of experts without a message, and an
adapter with NaN spoils the cache of others. So each adapter is checked first, and vLLM loads a copy: what was checked
is what is served, also if the folder changes later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from align.errors import UserError
from align.models.lora.folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Adapter,
    LowRank,
    Skeleton,
    changes,
    read,
    read_adapter,
    serving_problems,
    skeleton,
)
from align.run.adapted import require_base

LARGEST = 100.0
"""Largest absolute value of a factor. Larger ones occur in damaged adapters only, and could overflow in the model."""
LEAST = 1e-6
"""An adapter counts as untrained if no value of B is larger: its effect may vanish in float32."""


@dataclass(frozen=True)
class Base:
    """The base model, as far as adapters must fit it."""

    folder: Path
    bones: Skeleton
    dtype: torch.dtype

    @staticmethod
    def of(folder: Path, config: Any, dtype: str) -> Base:
        return Base(folder, skeleton(config), getattr(torch, dtype))

    @property
    def layer_names(self) -> list[str]:
        """Last components of the names of the layers that can be adapted, as vLLM's LoRA manager needs them."""
        targets = self.bones.targets
        experts = ["experts", "base_layer"] if self.bones.serves_expert_adapters and self.bones.experts else []
        return sorted({*targets.attention, *targets.mlp, *experts})


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that can be served.

    found: Its updates, by the name of the parameter.
    rank: Its largest rank.
    """

    adapter: Adapter
    found: dict[str, LowRank]
    rank: int


def check_adapter(folder: Path, base: Base, max_rank: int | None = None) -> CheckedAdapter:
    """Check an adapter by its settings and headers; UserError says why it cannot be served."""
    adapter = read_adapter(folder)
    found = changes(adapter, base.bones)
    require_base(folder, base.folder)
    if problem := next(serving_problems(found, adapter, base.bones), None):
        raise UserError(
            f"{folder}: it cannot be served beside its base ({problem}); merge it with `align adapter merge`, and "
            "serve the result."
        )
    updates = {name: change for name, change in found.items() if isinstance(change, LowRank)}
    rank = max(update.rank for update in updates.values())
    if max_rank is not None and rank > max_rank:
        raise UserError(
            f"{folder}: its rank {rank} exceeds --max-rank {max_rank}; start the server with --max-rank {rank}."
        )
    return CheckedAdapter(adapter, updates, rank)


def stage_adapter(checked: CheckedAdapter, base: Base, target: Path) -> bool:
    """Write the copy of an adapter that vLLM loads; returns False for an untrained one, whose B is zero.

    Every value is read, so one that is not finite is refused. The scaling is multiplied into B, and the factors of
    stacked experts get the names of their stacks: PEFT's depend on which stacks have an adapter.
    """
    tensors: dict[str, Tensor] = {}
    moves = False
    for name, update in checked.found.items():
        a, b = read(update.a), read(update.b) * update.scaling
        largest = max(float(a.abs().max()), float(b.abs().max()))
        if largest > LARGEST:
            raise UserError(
                f"{checked.adapter.folder}: the factors of '{name}' have values up to {largest:.3g}, which no trained "
                "adapter has; use an earlier checkpoint."
            )
        moves = moves or float(b.abs().max()) > LEAST
        module = vllm_module(name, base.bones)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.to(base.dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.to(base.dtype).contiguous()
    target.mkdir(parents=True)
    save_file(tensors, target / WEIGHTS)
    names = sorted({name.rpartition(".")[2] for name in (vllm_module(name, base.bones) for name in checked.found)})
    # With alpha = r the scaling is 1.
    values = {"peft_type": "LORA", "r": checked.rank, "lora_alpha": checked.rank, "target_modules": names}
    (target / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    return moves


def vllm_module(name: str, bones: Skeleton) -> str:
    """Name of the module in vLLM that takes the factors of a parameter."""
    if name not in bones.experts:
        return name.removesuffix(".weight")
    stem, _, stack = name.rpartition(".")
    return stem if stack == "down_proj" else f"{stem}.base_layer"
