"""Save and restore a training loop of our own: trainable weights, optimizers, counters. Safetensors and JSON only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.run.folder import replace_folder


def save_state(
    folder: Path,
    models: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    counters: dict[str, Any],
    others: dict[str, Tensor] | None = None,
    parts: Path | None = None,
) -> None:
    """Write `folder` whole or not at all. others: further tensors, under names of the caller's; parts: a folder whose
    content becomes part of this one."""
    tensors = {"rng": torch.get_rng_state()}
    tensors |= {f"other.{name}": tensor.contiguous() for name, tensor in (others or {}).items()}
    for key, model in models.items():
        for name, parameter in trainable(model).items():
            tensors[f"model.{key}.{name}"] = parameter.detach().contiguous()
    for key, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{key}.{index}.{name}"] = value.contiguous()

    def write(target: Path) -> None:
        save_file(tensors, target / "state.safetensors")
        (target / "state.json").write_text(json.dumps(counters), encoding="utf-8")
        for part in parts.iterdir() if parts is not None else ():
            part.rename(target / part.name)

    replace_folder(folder, write)


def load_state(
    folder: Path, models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put everything back; returns the counters and the other tensors."""
    tensors = load_file(folder / "state.safetensors")
    torch.set_rng_state(tensors["rng"])
    with torch.no_grad():
        for key, model in models.items():
            for name, parameter in trainable(model).items():
                parameter.copy_(tensors[f"model.{key}.{name}"])
    for key, optimizer in optimizers.items():
        states: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer.{key}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                index, field = name.removeprefix(prefix).split(".", 1)
                states.setdefault(int(index), {})[field] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    others = {name.removeprefix("other."): t for name, t in tensors.items() if name.startswith("other.")}
    return json.loads((folder / "state.json").read_text(encoding="utf-8")), others


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
