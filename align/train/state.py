"""Save and restore the state of align's own training loop as safetensors and JSON: unsharded learners, counters, and
torch's random state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.errors import UserError
from align.run.folder import replace_file, replace_folder

TENSORS, COUNTERS = "state.safetensors", "state.json"


def save_state(folder: Path, counters: dict[str, Any], tensors: Mapping[str, Tensor], learners: Path) -> None:
    """Replace `folder` by a new checkpoint, or leave the old one untouched if anything fails.

    counters: values that JSON can represent.
    tensors: additional tensors by name; torch's random state is saved as well.
    learners: folder into which the learners have saved their state; its content is moved into the checkpoint.
    """
    everything = {"rng": torch.get_rng_state()} | {f"other.{name}": t.contiguous() for name, t in tensors.items()}

    def write(target: Path) -> None:
        save_file(everything, target / TENSORS)
        (target / COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
        for learner in learners.iterdir():
            learner.rename(target / learner.name)

    replace_folder(folder, write)


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore torch's random state; return the counters and tensors that were passed to `save_state`."""
    tensors = load_file(folder / TENSORS)
    torch.set_rng_state(tensors["rng"])
    others = {name.removeprefix("other."): t for name, t in tensors.items() if name.startswith("other.")}
    return json.loads((folder / COUNTERS).read_text(encoding="utf-8")), others


def save_local_learner(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor]
) -> None:
    """Write a model's trained weights, its optimizer's state and its EMA weights to one file in `folder`."""
    tensors = {f"model.{name}": parameter.detach().contiguous() for name, parameter in trainable(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.contiguous() for name, value in state.items()}
    tensors |= {f"ema.{name}": tensor.contiguous() for name, tensor in ema.items()}
    replace_file(folder / TENSORS, lambda partial: save_file(tensors, partial))


@torch.no_grad()
def load_local_learner(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]
) -> None:
    """Restore what `save_local_learner` wrote, or the same tensors from a checkpoint of an earlier version."""
    if (folder / COUNTERS).is_file():  # only sharded learners write this file
        raise UserError(
            f"{folder.parent}: it was written by a run with a `parallel` section. Add the section "
            "(parallel.processes may differ), or start the stage again with --from."
        )
    path = folder / TENSORS
    tensors = load_file(path) if path.is_file() else _earlier_layout(folder)
    for name, parameter in trainable(model).items():
        parameter.copy_(tensors[f"model.{name}"])
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            states.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, weights in ema.items():
        weights.copy_(tensors[f"ema.{name}"])


def _earlier_layout(folder: Path) -> dict[str, Tensor]:
    """One learner's tensors from a checkpoint of an earlier version.

    Such a checkpoint has all learners in one file, under names such as `model.LEARNER.NAME`. Only its policy has EMA
    weights.
    """
    learner, found = folder.name, {}
    for key, tensor in load_file(folder.parent / TENSORS).items():
        kind, _, rest = key.partition(".")
        if kind in ("model", "optimizer") and rest.startswith(f"{learner}."):
            found[f"{kind}.{rest.removeprefix(f'{learner}.')}"] = tensor
        elif learner == "policy" and rest.startswith("ema."):
            found[rest] = tensor
    return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
