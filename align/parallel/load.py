"""Load a sharded model: every rank reads only its experts and, under ZeRO 3, only its shard of each tensor.

Parameters are allocated one after another. Under ZeRO 3 a parameter is allocated in full, this rank's shard is read
into it, and the rest is freed. The operating system provides memory only for the pages that are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from deepspeed import zero
from torch import nn

from align.config.lora import Lora
from align.config.parallel import Parallel
from align.config.paths import local_path
from align.errors import UserError
from align.models.family import Place, family_of
from align.models.lora.adapters import add_lora, is_lora_weight, plain_name
from align.models.lora.merge import plain_buffers
from align.models.lora.overlay import Overlay
from align.models.weight_files import StoredTensor, stored_tensors, weight_files
from align.models.weights import empty_model, load_generation_config, read_range, replace_parameter
from align.parallel.deepspeed_config import deepspeed_config
from align.parallel.experts import mark_adapters, shard_experts
from align.parallel.sharding import expert_shard, full_shape, world
from align.run.adapted import weights_of
from align.run.refusals import zero_3_problem


class LocalPartitioning(zero.Init):
    """DeepSpeed's partitioning of parameters without the broadcast from rank 0, because each rank reads its shard."""

    def _zero_init_param(self, parameter: Any) -> None:
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()

    def partition_parameter(self, parameter: Any) -> None:
        self._convert_to_zero_parameters([parameter])


MODELS = count()
"""Counter that numbers the models whose parameters this process offloads to NVMe."""


def load_sharded(
    model_class: Any,
    config: Any,
    folder: Path,
    dtype: torch.dtype,
    parallel: Parallel,
    lora: Lora | None = None,
    *,
    head_only: bool = False,
) -> Any:
    """Load a model in evaluation mode, as `from_pretrained` does. A score head missing from the files is random.

    lora: wrap the model with new adapters, as `add_lora` does. Every rank draws the initial values of all adapters,
        layer by layer, and keeps its shard, so the values equal those of an unsharded model.
    head_only: everything except the score head is frozen; the head may be frozen too.
    """
    if parallel.zero_stage == 3 and (problem := zero_3_problem(config.model_type)):
        raise UserError(problem)
    weights = weights_of(folder)
    stored = by_parameter(stored_tensors(weight_files(weights.base)), family_of(config).names(config).place)
    overlay = Overlay(weights.adapters, config)
    model = empty_model(model_class, config, folder, dtype)
    shard_experts(model, parallel.expert_parallel_size, trained=not head_only and (lora is None or lora.experts))
    head = None
    if hasattr(model, "score") and "score.weight" not in stored:
        head = nn.init.normal_(torch.empty(model.score.weight.shape, dtype=dtype), std=config.initializer_range)
    if lora is not None:
        model = with_adapters(model, lora)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    settings = deepspeed_config(parallel, micro_batch_size=1, accumulation=1, max_grad_norm=1.0, dtype=name)
    partitioning = None
    if parallel.zero_stage == 3:
        settings["train_batch_size"] = world()[1]
        if parallel.offload.parameters == "nvme":
            settings["zero_optimization"]["offload_param"] |= nvme_settings(model, parallel)
        # No dtype is passed: DeepSpeed would replace it by bfloat16 on a device without float16 support.
        partitioning = LocalPartitioning(config_dict_or_path=settings)
    for parameter_name, empty in list(model.named_parameters()):
        parameter = nn.Parameter(torch.empty(empty.shape, dtype=dtype), empty.requires_grad)
        parameter.__dict__.update(empty.__dict__)
        parts = stored.get(plain_name(parameter_name))
        if is_lora_weight(parameter_name):
            parameter.data.copy_(empty.data)
        elif parts is not None:
            read_range(parameter.data, parts, *local_range(parameter, parallel))
            overlay.apply(plain_name(parameter_name), parameter.data, *local_range(parameter, parallel))
        elif head is not None and plain_name(parameter_name) == "score.weight":
            parameter.data.copy_(head)
            overlay.apply("score.weight", parameter.data)
        else:
            raise UserError(f"{folder}: the tensor of '{parameter_name}' is missing; copy the missing files.")
        replace_parameter(model, empty, parameter)
        if partitioning is not None:
            partitioning.partition_parameter(parameter)
    for buffer_name, buffer in plain_buffers(model):
        if buffer_name not in stored:
            raise UserError(f"{folder}: the tensor of '{buffer_name}' is missing; copy the missing files.")
        ((tensor, _),) = stored[buffer_name]
        tensor.read_into(buffer)
        overlay.apply(buffer_name, buffer)
    load_generation_config(model, folder)
    return model.eval()


def nvme_settings(model: nn.Module, parallel: Parallel) -> dict[str, Any]:
    """DeepSpeed's settings for the model's parameters on NVMe: folder and buffer size."""
    ranks = world()[1]
    return {
        # One folder per model, because DeepSpeed empties it before writing, and a stage may load several models.
        "nvme_path": str(local_path(str(parallel.offload.path)) / f"model-{next(MODELS)}"),
        # The largest shard must fit into a buffer. DeepSpeed has five, by default of 100 million elements each.
        "buffer_size": max(
            -(-parameter.numel() // (ranks // parallel.expert_parallel_size if expert_shard(parameter) else ranks))
            for parameter in model.parameters()
        ),
    }


def with_adapters(model: Any, lora: Lora) -> Any:
    """Add initialised adapters to a model on the meta device.

    PEFT takes an adapter's shape and device from the weight, so each weight is replaced by a full-shape stand-in backed
    by one element while the adapters are created.
    """
    from align.models.lora.experts import adapt_by_row

    stand_ins = {}
    for empty in list(model.parameters()):
        stand_in = torch.empty((), dtype=empty.dtype).expand(full_shape(empty))
        stand_ins[empty] = nn.Parameter(stand_in, empty.requires_grad)
        replace_parameter(model, empty, stand_ins[empty])
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    model = add_lora(model, lora, task=task, in_float32=False)  # DeepSpeed keeps its own float32 copies
    for empty, stand_in in stand_ins.items():
        replace_parameter(model, stand_in, empty.requires_grad_(False))
    adapt_by_row(model)
    mark_adapters(model)
    return model


def by_parameter(
    stored: list[StoredTensor], place: Callable[[str], Place]
) -> dict[str, list[tuple[StoredTensor, Place]]]:
    """The stored tensors that make up each parameter, by the parameter's name."""
    found: dict[str, list[tuple[StoredTensor, Place]]] = {}
    for tensor in stored:
        where = place(tensor.name)
        found.setdefault(where.parameter, []).append((tensor, where))
    return found


def local_range(parameter: Any, parallel: Parallel) -> tuple[int, int, int]:
    """(this rank's first expert, start and end of its ZeRO partition in the flattened parameter)."""
    rank, ranks = world()
    shard = expert_shard(parameter)
    group = shard.ranks if shard else 1
    first = (rank % group) * parameter.shape[0] if shard else 0
    if parallel.zero_stage < 3:
        return first, 0, parameter.numel()
    size = math.ceil(parameter.numel() / (ranks // group))
    start = min(parameter.numel(), rank // group * size)
    return first, start, min(parameter.numel(), start + size)
