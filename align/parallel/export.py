"""Write a sharded model as a Hugging Face checkpoint: rank 0 gathers tensor by tensor and writes a file per layer."""

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
from align.models.lora.adapters import is_lora_weight, save_adapter
from align.models.lora.experts import delta, peft_shape
from align.models.lora.merge import plain_buffers, plain_parameters
from align.parallel.sharding import full_shape, shard_values, shards, world

INDEX = "model.safetensors.index.json"


@torch.no_grad()
def gathered(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Gather every parameter on rank 0; yields (parameter name in the model, full tensor on the CPU).

    Collective: every rank must iterate to the end. Other ranks send their shards and get empty tensors. Adapters are
    merged. Peak extra memory on rank 0: one full tensor and its adapter's product.
    """
    rank, _ = world()
    buffers = dict(plain_buffers(model))  # every rank has them
    for name, parameter, adapters in plain_parameters(model):
        full = gather(parameter, dtype, rank)
        for adapter in adapters:
            for key in adapter.active_adapters:
                a, b = (gather(f[key].weight, torch.float32, rank) for f in (adapter.lora_A, adapter.lora_B))
                if rank == 0:
                    full += delta(adapter, key, a, b).to(dtype)
        for buffer_name in [buffer_name for buffer_name in buffers if layer_number(buffer_name) == layer_number(name)]:
            buffer = buffers.pop(buffer_name)
            yield buffer_name, buffer.cpu() if rank == 0 else buffer.new_empty(0)
        yield name, full


def layer_number(name: str) -> int:
    """1 for the first decoder layer; 0 for parameters outside the layers."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found[1]) + 1 if found else 0


@torch.no_grad()
def save_sharded_adapter(model: Any, folder: Path) -> None:
    """Write the adapter to `folder` in the format that PEFT uses for an unsharded model. Collective; rank 0 writes."""
    rank, _ = world()
    tensors: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # PEFT writes tied embeddings twice
        if is_lora_weight(name) or ".modules_to_save." in name:
            first = first_names.setdefault(id(parameter), name)
            tensors[name] = (
                tensors[first] if first != name else peft_shape(name, gather(parameter, torch.float32, rank))
            )
    if rank == 0:
        save_adapter(model, folder, state_dict=tensors)


def gather(parameter: Any, dtype: torch.dtype, rank: int) -> Tensor:
    """The full parameter on rank 0, in host memory; empty on other ranks. Collective."""
    shape = full_shape(parameter)
    full = torch.empty(math.prod(shape) if rank == 0 else 0, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # NCCL sends GPU tensors only
    for shard in shards(parameter):
        if shard.rank == rank:
            values = shard_values(parameter, shard).to(dtype)
            if rank == 0:
                full[shard.start : shard.start + shard.size] = values
            else:
                dist.send(values.contiguous().to(device), dst=0)
                if device == "cuda":
                    # NCCL only enqueues the send. A rank that ran ahead of rank 0 would keep copies of all its shards
                    # on the GPU, and its last send would time out while rank 0 writes.
                    torch.cuda.synchronize()
        elif rank == 0:
            received = torch.empty(shard.size, dtype=dtype, device=device)
            dist.recv(received, src=shard.rank)
            full[shard.start : shard.start + shard.size] = received
    return full.view(shape) if rank == 0 else full


def write_model(model: Any, tensors: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Write a safetensors checkpoint on rank 0, one file per layer and one for the rest; other ranks only iterate."""
    rank, _ = world()
    names = family_of(model.config).names(model.config)
    last = model.config.num_hidden_layers
    files = last + 1
    pending: dict[int, dict[str, Tensor]] = {}
    places: dict[str, str] = {}
    total = 0

    def flush(number: int) -> None:
        if layer := pending.pop(number, None):
            save_file(layer, folder / file_name(number, files), metadata={"format": "pt"})

    current = 0
    for name, tensor in tensors:
        number = layer_number(name)
        if number != current and current != 0:
            flush(current)
        current = number
        if rank != 0:
            continue
        for key, part in names.published(name, tensor):
            pending.setdefault(number, {})[key] = part.clone() if part.numel() < tensor.numel() else part
            places[key] = file_name(number, files)
            total += part.numel() * part.element_size()
    if rank != 0:
        return
    for number in sorted(pending):
        flush(number)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = model.config
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def file_name(number: int, files: int) -> str:
    return f"model-{number + 1:05d}-of-{files:05d}.safetensors"


def save_sharded_model(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the model to `folder`. Collective; rank 0 writes."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    write_model(plain, gathered(model, dtype), folder, dtype)
