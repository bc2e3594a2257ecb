"""Write a spread model as an ordinary checkpoint: tensor by tensor to rank 0, which writes a file a layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from align.models.family import family_of
from align.models.lora.adapters import is_factor
from align.models.lora.experts import delta, peft_shape
from align.models.lora.merge import plain_parameters
from align.parallel.sharding import own_values, pieces, whole_shape, world

INDEX = "model.safetensors.index.json"


@torch.no_grad()
def gathered(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name in our layout, whole tensor on the CPU) of every parameter, on rank 0; every rank must iterate to the end.

    The others send what they hold and see empty tensors. Adapters are merged. Peak extra memory: one tensor, on rank 0,
    and with it what an adapter adds to it.
    """
    rank, _ = world()
    for name, parameter, adapters in plain_parameters(model):
        whole = gather(parameter, dtype, rank)
        for adapter in adapters:
            for key in adapter.active_adapters:
                a, b = (gather(f[key].weight, torch.float32, rank) for f in (adapter.lora_A, adapter.lora_B))
                if rank == 0:
                    whole += delta(adapter, key, a, b).to(dtype)
        yield name, whole


@torch.no_grad()
def save_spread_adapter(model: Any, folder: Path) -> None:
    """Write `folder` (on rank 0) from all ranks, as PEFT writes the adapter of a single process."""
    rank, _ = world()
    tensors = {}
    for name, parameter in model.named_parameters():
        if is_factor(name) or ".modules_to_save." in name:
            tensors[name] = peft_shape(name, gather(parameter, torch.float32, rank))
    if rank == 0:
        model.save_pretrained(folder, state_dict=tensors)


def gather(parameter: Any, dtype: torch.dtype, rank: int) -> Tensor:
    shape = whole_shape(parameter)
    whole = torch.empty(math.prod(shape) if rank == 0 else 0, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # NCCL carries nothing else
    for piece in pieces(parameter):
        if piece.rank == rank:
            values = own_values(parameter, piece).to(dtype)
            if rank == 0:
                whole[piece.start : piece.start + piece.size] = values
            else:
                dist.send(values.contiguous().to(device), dst=0)
        elif rank == 0:
            arrived = torch.empty(piece.size, dtype=dtype, device=device)
            dist.recv(arrived, src=piece.rank)
            whole[piece.start : piece.start + piece.size] = arrived
    return whole.view(shape) if rank == 0 else whole


def write_model(model: Any, tensors: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Rank 0: a checkpoint of safetensors, a file for each layer and one for the rest; the others: iterate along."""
    rank, _ = world()
    published = family_of(model.config).published
    last = model.config.num_hidden_layers
    files = last + 1
    shards: dict[int, dict[str, Tensor]] = {}
    places: dict[str, str] = {}
    total = 0

    def flush(shard: int) -> None:
        if held := shards.pop(shard, None):
            save_file(held, folder / file_name(shard, files), metadata={"format": "pt"})

    current = 0
    for name, tensor in tensors:
        found = re.search(r"\blayers\.(\d+)\.", name)
        shard = int(found[1]) + 1 if found else 0
        if shard != current and current != 0:
            flush(current)
        current = shard
        if rank != 0:
            continue
        for key, part in published(name, tensor):
            shards.setdefault(shard, {})[key] = part.clone() if part.numel() < tensor.numel() else part
            places[key] = file_name(shard, files)
            total += part.numel() * part.element_size()
    if rank != 0:
        return
    for shard in sorted(shards):
        flush(shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = model.config
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def file_name(shard: int, files: int) -> str:
    return f"model-{shard + 1:05d}-of-{files:05d}.safetensors"


def save_spread_model(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write `folder` (on rank 0) from all ranks."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    write_model(plain, gathered(model, dtype), folder, dtype)
