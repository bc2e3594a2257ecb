"""Training state that any number of processes can write and any other number can read.

Every rank writes the runs it holds of float32 weights and AdamW's two moments, under the parameter's name and the place
of the run in the whole tensor. A reader takes from the files whatever overlaps what it holds, however many wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.distributed.layout import is_partitioned, own_piece, world
from align.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


class Held:
    """What this rank's optimizer holds of one parameter: flat float32 tensors by kind, which start at `start`."""

    def __init__(self, name: str, parameter: Any, optimizer: Any):
        self.name, self.parameter, self.optimizer = name, parameter, optimizer
        piece = own_piece(parameter)
        self.start, self.count = (piece.start, piece.size) if piece else (0, 0)
        self.mapping = getattr(parameter, "_hp_mapping", None)
        if not is_partitioned(parameter) and hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2 cut the optimizer only
            address = self.mapping.lp_fragment_address if self.mapping else None
            base = first_element(parameter)
            self.start, self.count = (base + address.start, address.numel) if address else (0, 0)

    def read(self, kind: str) -> Tensor:
        if is_partitioned(self.parameter):
            key = None if kind == "weight" else kind
            return self.optimizer.get_local_fp32_param(self.parameter, key)[: self.count]
        if self.mapping is not None:
            return self.mapping.get_hp_fragment(None if kind == "weight" else kind)
        whole = self.parameter.detach() if kind == "weight" else self.optimizer.state[self.parameter][kind]
        return whole.flatten()

    def write(self, kind: str, values: Tensor) -> None:
        if is_partitioned(self.parameter):
            held = self.parameter.ds_tensor
            padded = torch.zeros(held.ds_numel, dtype=torch.float32)
            padded[: self.count] = values
            self.optimizer.set_local_hp_param(padded, self.parameter, None if kind == "weight" else kind)
            if kind == "weight":
                held.data.copy_(padded)
        elif self.mapping is not None:
            self.read(kind).data.copy_(values)
        else:
            self.read(kind).copy_(values)


def first_element(parameter: Any) -> int:
    """Where this rank's share of a stack of experts begins; 0 for a parameter that is not spread."""
    share = getattr(parameter, "expert_share", None)
    return (world()[0] % share.ranks) * parameter.numel() if share else 0


def held_parameters(engine: Any) -> Iterator[Held]:
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield Held(name, parameter, optimizer)


def save_training_state(engine: Any, folder: Path) -> None:
    """Every rank writes its file; the folder holds the whole state once all have returned."""
    rank, processes = world()
    folder.mkdir(parents=True, exist_ok=True)
    steps = adam_steps(engine)
    kinds = KINDS if steps else KINDS[:1]  # before its first step AdamW has no moments
    tensors = {
        f"{kind}:{held.name}@{held.start}": held.read(kind).to("cpu", copy=True).contiguous()
        for held in held_parameters(engine)
        if held.count
        for kind in kinds
    }
    path = folder / f"state-{rank:05d}-of-{processes:05d}.safetensors"
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)
    if rank == 0:
        (folder / "state.json").write_text(json.dumps({"processes": processes, "steps": steps}))
    if dist.is_initialized():
        dist.barrier()


def load_training_state(engine: Any, folder: Path) -> None:
    """Put every rank's part back, whatever the number of processes that wrote it; raises `UserError` for a hole."""
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder.parent} was written by a run without `parallel`; resume it without, or start again.")
    about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    kinds = KINDS if about["steps"] else KINDS[:1]
    files = [folder / f"state-{r:05d}-of-{about['processes']:05d}.safetensors" for r in range(about["processes"])]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} is missing; copy it, or remove {folder.parent} to resume from an earlier checkpoint."
            )
    if about["steps"]:
        set_adam_steps(engine, about["steps"])
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        runs: dict[str, list[tuple[int, Any, str]]] = {}
        for tensors in opened:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                what, _, start = key.rpartition("@")
                runs.setdefault(what, []).append((int(start), tensors, key))
        for held in held_parameters(engine):
            for kind in kinds if held.count else ():
                held.write(kind, assemble(runs.get(f"{kind}:{held.name}", []), held, folder))
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def assemble(runs: list[tuple[int, Any, str]], held: Held, folder: Path) -> Tensor:
    """The elements that this rank holds of a tensor, from the runs that overlap them."""
    start, count = held.start, held.count
    values, filled = torch.empty(count), 0
    for first, tensors, key in runs:
        part = tensors.get_slice(key)
        (length,) = part.get_shape()
        low, high = max(start, first), min(start + count, first + length)
        if low < high:
            values[low - start : high - start] = part[low - first : high - first]
            filled += high - low
    if filled != count:
        raise UserError(
            f"{folder}: does not hold the whole of '{held.name}'; remove {folder.parent} to resume from an earlier one."
        )
    return values


def adam_states(engine: Any) -> dict[Any, dict[str, Any]]:
    """AdamW's state, as DeepSpeed keeps it: by flat partition, or by parameter without ZeRO."""
    optimizer = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer).state


def adam_steps(engine: Any) -> int:
    return max((int(state["step"]) for state in adam_states(engine).values() if "step" in state), default=0)


def set_adam_steps(engine: Any, steps: int) -> None:
    """AdamW makes its state in the first step; here it must exist before."""
    optimizer, states = engine.optimizer, adam_states(engine)
    for flat in flat_parameters(optimizer):
        state = states.setdefault(flat, {})
        for kind in MOMENTS:
            state.setdefault(kind, torch.zeros_like(flat))
        state["step"] = torch.tensor(float(steps))
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def flat_parameters(optimizer: Any) -> list[Tensor]:
    """What AdamW itself updates: under ZeRO flat float32 partitions, else the parameters."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
