"""Training state that any number of processes can write and any other number can read.

Every rank writes the runs it holds of float32 weights and AdamW's two moments, and of the weights' average where there
is one, under the parameter's name and the place of the run in the whole tensor. A reader takes from the files whatever
overlaps what it holds, however many wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from align.errors import UserError
from align.parallel.sharding import is_partitioned, own_piece, world

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
AVERAGE = "average"


class Held:
    """What this rank's optimizer holds of one parameter: flat float32 tensors by kind, which start at `start`.

    master: what AdamW updates where ZeRO cuts nothing: the parameter, or its copy in float32. saves: no rank before
    this one holds the same.
    """

    def __init__(self, name: str, parameter: Any, optimizer: Any, master: Tensor):
        self.name, self.parameter, self.optimizer, self.master = name, parameter, optimizer, master
        self.mapping = getattr(parameter, "_hp_mapping", None)
        piece = own_piece(parameter)
        if is_partitioned(parameter):
            self.start, self.count = (piece.start, piece.size) if piece else (0, 0)
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2 cut the optimizer only
            address = self.mapping.lp_fragment_address if self.mapping else None
            base = first_element(parameter)
            self.start, self.count = (base + address.start, address.numel) if address else (0, 0)
        else:
            self.start, self.count = first_element(parameter), parameter.numel()
            self.saves = piece is not None
            return
        self.saves = self.count > 0

    def read(self, kind: str) -> Tensor:
        if is_partitioned(self.parameter):
            key = None if kind == "weight" else kind
            part: Tensor = self.optimizer.get_local_fp32_param(self.parameter, key)
            return part[: self.count]
        if self.mapping is not None:
            if kind == "weight":
                weight: Tensor = self.mapping.get_hp_fragment()
                return weight
            # The mapping's own way to the moments is made in the first step, when one parameter group alone has them.
            flat = flat_parameters(self.optimizer)[self.mapping.param_group_index]
            address = self.mapping.hp_fragment_address
            moment: Tensor = self.optimizer.optimizer.state[flat][kind]
            return moment.narrow(0, address.start, address.numel)
        whole = self.master.detach() if kind == "weight" else self.optimizer.state[self.master][kind]
        return whole.flatten()

    def write(self, kind: str, values: Tensor) -> None:
        if is_partitioned(self.parameter):
            held = self.parameter.ds_tensor
            padded = torch.zeros(held.ds_numel, dtype=torch.float32)
            padded[: self.count] = values
            self.optimizer.set_local_hp_param(padded, self.parameter, None if kind == "weight" else kind)
            if kind == "weight":
                put_slice(self.parameter, padded)
        elif self.mapping is not None:
            self.read(kind).data.copy_(values)
        else:
            self.read(kind).copy_(values)
            if kind == "weight":
                self.parameter.data.copy_(self.master.data)


def put_slice(parameter: Any, values: Tensor) -> None:
    """Give ZeRO 3's slice of a parameter other values, in memory or on the disk that it is offloaded to."""
    held = parameter.ds_tensor
    if held.status == PartitionedParamStatus.AVAILABLE:
        held.data.copy_(values)
    else:
        parameter.nvme_swapper.swap_out_partitioned_params(dst_fp16_params=[parameter], src_fp32_params=[values])


def first_element(parameter: Any) -> int:
    """Where this rank's share of a stack of experts begins; 0 for a parameter that is not spread."""
    share = getattr(parameter, "expert_share", None)
    return (world()[0] % share.ranks) * parameter.numel() if share else 0


def held_parameters(engine: Any) -> Iterator[Held]:
    """What this rank has a part of, of all that learns."""
    optimizer = engine.optimizer
    masters = float32_copies(optimizer)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            held = Held(name, parameter, optimizer, masters.get(parameter, parameter))
            if held.count:
                yield held


def float32_copies(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Without ZeRO, DeepSpeed keeps one of each bf16 parameter."""
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    return {parameter: copy for group in groups for parameter, copy in zip(*group, strict=True)}


def exchange_weights(engine: Any, values: dict[str, Tensor]) -> None:
    """Give all that learns other weights, by the names of `held_parameters`; `values` gets those that were there."""
    for held in held_parameters(engine):
        other = values[held.name]
        present = held.read("weight").to(other.device, copy=True)
        held.write("weight", other)
        values[held.name] = present
    spread_float32_weights(engine)


def spread_float32_weights(engine: Any) -> None:
    """Under ZeRO 1 and 2, whose ranks have updated a part each, give all ranks all weights."""
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def save_training_state(engine: Any, folder: Path, average: Mapping[str, Tensor] | None = None) -> None:
    """Every rank writes its file; the folder holds the whole state once all have returned.

    average: this rank's part of the weights' average, by the names of `held_parameters`.
    """
    rank, processes = world()
    folder.mkdir(parents=True, exist_ok=True)
    steps = adam_steps(engine)
    kinds = KINDS if steps else KINDS[:1]  # before its first step AdamW has no moments
    own = [held for held in held_parameters(engine) if held.saves]
    tensors = {
        f"{kind}:{held.name}@{held.start}": held.read(kind).to("cpu", copy=True).contiguous()
        for held in own
        for kind in kinds
    }
    if average is not None:
        tensors |= {f"{AVERAGE}:{held.name}@{held.start}": average[held.name].to("cpu", copy=True) for held in own}
    path = folder / f"state-{rank:05d}-of-{processes:05d}.safetensors"
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)
    if rank == 0:
        (folder / "state.json").write_text(json.dumps({"processes": processes, "steps": steps}))
    if dist.is_initialized():
        dist.barrier()


def load_training_state(engine: Any, folder: Path, average: Mapping[str, Tensor] | None = None) -> None:
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
            for kind in kinds:
                held.write(kind, assemble(runs.get(f"{kind}:{held.name}", []), held, folder))
            if average is not None:
                average[held.name].copy_(assemble(runs.get(f"{AVERAGE}:{held.name}", []), held, folder))
    spread_float32_weights(engine)


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
    states: dict[Any, dict[str, Any]] = getattr(optimizer, "optimizer", optimizer).state
    return states


def adam_steps(engine: Any) -> int:
    return max((int(state["step"]) for state in adam_states(engine).values() if "step" in state), default=0)


def set_adam_steps(engine: Any, steps: int) -> None:
    """AdamW makes its state in the first step; here it must exist before."""
    optimizer, states = engine.optimizer, adam_states(engine)
    for group, flat in enumerate(flat_parameters(optimizer)):
        with in_memory(optimizer, group):
            state = states.setdefault(flat, {})
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(flat))
            state["step"] = torch.tensor(float(steps))
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def in_memory(optimizer: Any, group: int) -> Iterator[None]:
    """Within it, what AdamW holds of a group is in memory; where it is offloaded to a disk it goes back to it."""
    on_disk = getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(group)
    if on_disk:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    if on_disk:
        optimizer._optimizer_states_and_gradient_swap_out(group)


def flat_parameters(optimizer: Any) -> list[Tensor]:
    """What AdamW itself updates: under ZeRO flat float32 partitions, else the parameters."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
