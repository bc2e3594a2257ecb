"""Save sharded training state, and load it on any number of ranks.

Every rank writes its shards of the float32 weights, of AdamW's two moments and of the EMA weights, if any. A shard's
key has the parameter's name and the shard's offset in the full tensor. On loading, each rank reads from all files the
ranges that overlap its own shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from safetensors import safe_open
from torch import Tensor, nn

from align.errors import UserError
from align.parallel.sharding import expert_shard, is_partitioned, local_shard, world

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
AVERAGE = "average"
"""Kind of the EMA weights in the files."""


class LocalState:
    """This rank's shard of a parameter's training state: a flat float32 tensor for each kind in `KINDS`.

    name       name of the parameter
    start      offset of the shard in the flattened full parameter
    count      number of elements in the shard
    master     without ZeRO, the tensor that AdamW updates: the parameter or its float32 copy
    saves      True if this rank writes the shard, because no lower rank holds the same shard
    """

    def __init__(self, name: str, parameter: Any, optimizer: Any, master: Tensor):
        self.name, self.parameter, self.optimizer, self.master = name, parameter, optimizer, master
        self.mapping = getattr(parameter, "_hp_mapping", None)
        shard = local_shard(parameter)
        if is_partitioned(parameter):
            self.start, self.count = (shard.start, shard.size) if shard else (0, 0)
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2 partition the optimizer state only
            address = self.mapping.lp_fragment_address if self.mapping else None
            base = first_element(parameter)
            self.start, self.count = (base + address.start, address.numel) if address else (0, 0)
        else:
            self.start, self.count = first_element(parameter), parameter.numel()
            self.saves = shard is not None
            return
        self.saves = self.count > 0

    def read(self, kind: str) -> Tensor:
        """This rank's shard of the weight or a moment, flat, in float32; a view if DeepSpeed provides one."""
        if is_partitioned(self.parameter):
            key = None if kind == "weight" else kind
            part: Tensor = self.optimizer.get_local_fp32_param(self.parameter, key)
            return part[: self.count]
        if self.mapping is not None:
            if kind == "weight":
                weight: Tensor = self.mapping.get_hp_fragment()
                return weight
            # DeepSpeed gives the mapping access to the moments in the first step, and for one parameter group only.
            flat = flat_parameters(self.optimizer)[self.mapping.param_group_index]
            address = self.mapping.hp_fragment_address
            moment: Tensor = self.optimizer.optimizer.state[flat][kind]
            return moment.narrow(0, address.start, address.numel)
        whole = self.master.detach() if kind == "weight" else self.optimizer.state[self.master][kind]
        return whole.flatten()

    def write(self, kind: str, values: Tensor) -> None:
        """Overwrite the shard of the weight or a moment; a weight also in the parameter that the forward pass uses.

        Under ZeRO 1 and 2 this parameter changes only in `all_gather_weights`.
        """
        if is_partitioned(self.parameter):
            padded = torch.zeros(self.parameter.ds_tensor.ds_numel, dtype=torch.float32)
            padded[: self.count] = values
            self.optimizer.set_local_hp_param(padded, self.parameter, None if kind == "weight" else kind)
            if kind == "weight":
                write_partition(self.parameter, padded)
        elif self.mapping is not None:
            self.read(kind).data.copy_(values)
        else:
            self.read(kind).copy_(values)
            if kind == "weight":
                self.parameter.data.copy_(self.master.data)


def write_partition(parameter: Any, values: Tensor) -> None:
    """Overwrite a parameter's ZeRO 3 partition in memory, or on disk if it is offloaded to NVMe."""
    partition = parameter.ds_tensor
    if partition.status == PartitionedParamStatus.AVAILABLE:
        partition.data.copy_(values)
    else:
        parameter.nvme_swapper.swap_out_partitioned_params(dst_fp16_params=[parameter], src_fp32_params=[values])


def first_element(parameter: Any) -> int:
    """Offset of this rank's experts in the flattened stack; 0 for a parameter that is not sharded by expert."""
    shard = expert_shard(parameter)
    return (world()[0] % shard.ranks) * parameter.numel() if shard else 0


def local_states(engine: Any) -> Iterator[LocalState]:
    """This rank's state of every trained parameter, except where its shard is empty."""
    optimizer = engine.optimizer
    masters = float32_copies(optimizer)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            state = LocalState(name, parameter, optimizer, masters.get(parameter, parameter))
            if state.count:
                yield state


def float32_copies(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """The float32 copies that DeepSpeed keeps of bf16 parameters at ZeRO 0; otherwise empty."""
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    return {parameter: copy for group in groups for parameter, copy in zip(*group, strict=True)}


def swap_weights(engine: Any, values: dict[str, Tensor]) -> None:
    """Swap the trained weights with `values`: this rank's shards, by parameter name. Collective."""
    for state in local_states(engine):
        new = values[state.name]
        old = state.read("weight").to(new.device, copy=True)
        state.write("weight", new)
        values[state.name] = old
    all_gather_weights(engine)


def all_gather_weights(engine: Any) -> None:
    """Under ZeRO 1 and 2, all-gather the weights of the forward pass from the float32 shards; otherwise a no-op."""
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def save_training_state(engine: Any, folder: Path, average: Mapping[str, Tensor] | None = None) -> None:
    """Write this rank's file, and return once every rank has written its file. Collective.

    average: this rank's shards of the EMA weights, by parameter name.
    """
    rank, processes = world()
    folder.mkdir(parents=True, exist_ok=True)
    steps = adam_steps(engine)
    kinds = KINDS if steps else KINDS[:1]  # AdamW has no moments before its first step
    states = [state for state in local_states(engine) if state.saves]
    parts: list[tuple[str, int, Callable[[], Tensor]]] = [
        (f"{kind}:{state.name}@{state.start}", state.count, partial(state.read, kind))
        for state in states
        for kind in kinds
    ]
    if average is not None:
        parts += [
            (f"{AVERAGE}:{state.name}@{state.start}", state.count, partial(average.__getitem__, state.name))
            for state in states
        ]
    path = folder / f"state-{rank:05d}-of-{processes:05d}.safetensors"
    incomplete = path.with_suffix(".partial")
    write_parts(incomplete, parts)
    incomplete.rename(path)
    if rank == 0:
        (folder / "state.json").write_text(json.dumps({"processes": processes, "steps": steps}))
    if dist.is_initialized():
        dist.barrier()


def write_parts(file: Path, parts: list[tuple[str, int, Callable[[], Tensor]]]) -> None:
    """Write flat tensors to a safetensors file in float32, copying one tensor at a time to host memory.

    parts: for each tensor its name, its number of elements, and a function that returns it.
    """
    header, end = {}, 0
    for name, count, _ in parts:
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, count, read in parts:
            values = read().detach().to("cpu", torch.float32).contiguous()
            if values.numel() != count:
                raise ValueError(f"'{name}' has {values.numel()} elements instead of {count}")
            out.write(values.numpy().data)
            del values  # free it before the next tensor is read


def load_training_state(engine: Any, folder: Path, average: Mapping[str, Tensor] | None = None) -> None:
    """Restore this rank's shards from the files of any number of ranks.

    Raises `UserError` if a file or an element is missing, or if a run without `parallel` wrote the checkpoint.
    """
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
        found: dict[str, list[tuple[int, Any, str]]] = {}
        for tensors in opened:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                what, _, start = key.rpartition("@")
                found.setdefault(what, []).append((int(start), tensors, key))
        for state in local_states(engine):
            for kind in kinds:
                state.write(kind, assemble(found.get(f"{kind}:{state.name}", []), state, folder))
            if average is not None:
                average[state.name].copy_(assemble(found.get(f"{AVERAGE}:{state.name}", []), state, folder))
    all_gather_weights(engine)


def assemble(shards: list[tuple[int, Any, str]], state: LocalState, folder: Path) -> Tensor:
    """Assemble this rank's shard of a tensor from the stored shards that overlap it.

    shards: for each stored shard its offset in the full tensor, its opened file, and its key in the file.
    """
    start, count = state.start, state.count
    values, filled = torch.empty(count), 0
    for first, tensors, key in shards:
        part = tensors.get_slice(key)
        (length,) = part.get_shape()
        low, high = max(start, first), min(start + count, first + length)
        if low < high:
            values[low - start : high - start] = part[low - first : high - first]
            filled += high - low
    if filled != count:
        raise UserError(
            f"{folder}: elements of '{state.name}' are missing; remove {folder.parent} to resume from an earlier one."
        )
    return values


def adam_states(engine: Any) -> dict[Any, dict[str, Any]]:
    """AdamW's state, by the tensors that AdamW updates (see `flat_parameters`)."""
    optimizer = engine.optimizer
    states: dict[Any, dict[str, Any]] = getattr(optimizer, "optimizer", optimizer).state
    return states


def adam_steps(engine: Any) -> int:
    return max((int(state["step"]) for state in adam_states(engine).values() if "step" in state), default=0)


def set_adam_steps(engine: Any, steps: int) -> None:
    """Create AdamW's state, which AdamW itself creates only in its first step, and set its step count."""
    optimizer, states = engine.optimizer, adam_states(engine)
    for group, flat in enumerate(flat_parameters(optimizer)):
        with in_memory(optimizer, group):
            state = states.setdefault(flat, {})
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(flat))
            # Fused AdamW needs the step count on the parameter's device.
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def in_memory(optimizer: Any, group: int) -> Iterator[None]:
    """Within the block, keep a parameter group's AdamW state in memory; state on disk is swapped in and out."""
    on_disk = getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(group)
    if on_disk:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    if on_disk:
        optimizer._optimizer_states_and_gradient_swap_out(group)


def flat_parameters(optimizer: Any) -> list[Tensor]:
    """The tensors that AdamW updates: flat float32 partitions under ZeRO, otherwise the parameters or their float32
    copies."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
