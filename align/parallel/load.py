"""Build a model of which every rank reads and keeps only its own: its experts, and under ZeRO 3 its run of each tensor.

Parameters get memory one after the other. Under ZeRO 3 each is laid out whole for a moment, but only this rank's run of
it is read, and then cut down to that run; untouched memory is never backed by the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from deepspeed import zero
from torch import Tensor, nn
from transformers import GenerationConfig

from align.config.parallel import Parallel
from align.config.parts import Lora
from align.config.paths import local_path
from align.errors import UserError
from align.models.family import Place, family_of
from align.models.lora.adapters import add_lora, is_factor, plain_name
from align.models.weight_files import StoredTensor, stored_tensors, weight_files
from align.parallel.deepspeed_config import deepspeed_config
from align.parallel.experts import mark_adapters, spread_experts
from align.parallel.sharding import expert_share, whole_shape, world


class OwnRuns(zero.Init):
    """DeepSpeed's way to cut a parameter up, without sending rank 0's values to all: each rank has read its own."""

    def _zero_init_param(self, parameter: Any) -> None:
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()

    def cut(self, parameter: Any) -> None:
        self._convert_to_zero_parameters([parameter])


MODELS = count()
"""Numbers the models that this process has loaded."""


def load_spread(
    model_class: Any,
    config: Any,
    folder: Path,
    dtype: torch.dtype,
    parallel: Parallel,
    lora: Lora | None = None,
    *,
    head_only: bool = False,
) -> Any:
    """A model in evaluation mode, as `from_pretrained` would give it; a head that is not in the files is random.

    With `lora` it is wrapped by PEFT and only the adapters train. Their first values are those of a single process: a
    rank draws them all, one layer after the other, and keeps its own. head_only: at most the head will train.
    """
    stored = by_parameter(stored_tensors(weight_files(folder)), family_of(config).place)
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, dtype=dtype)
    model.name_or_path = str(folder)
    model.tie_weights()
    spread_experts(model, parallel.expert_parallel_size, trained=not head_only and (lora is None or lora.experts))
    head = None
    if hasattr(model, "score") and "score.weight" not in stored:
        head = nn.init.normal_(torch.empty(model.score.weight.shape, dtype=dtype), std=config.initializer_range)
    if lora is not None:
        model = wrapped(model, lora)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    settings = deepspeed_config(parallel, micro_batch_size=1, accumulation=1, max_grad_norm=1.0, dtype=name)
    own_runs = None
    if parallel.zero_stage == 3:
        settings["train_batch_size"] = world()[1]
        if parallel.offload.parameters == "nvme":
            settings["zero_optimization"]["offload_param"] |= on_disk(model, parallel)
        # Given a dtype as well, DeepSpeed takes bfloat16 wherever the processor has no float16.
        own_runs = OwnRuns(config_dict_or_path=settings)
    for parameter_name, empty in list(model.named_parameters()):
        parameter = nn.Parameter(torch.empty(empty.shape, dtype=dtype), empty.requires_grad)
        parameter.__dict__.update(empty.__dict__)
        pieces = stored.get(plain_name(parameter_name))
        if is_factor(parameter_name):
            parameter.data.copy_(empty.data)
        elif pieces is not None:
            fill(parameter.data, pieces, *own_range(parameter, parallel))
        elif head is not None and plain_name(parameter_name) == "score.weight":
            parameter.data.copy_(head)
        else:
            raise UserError(f"{folder}: there is no tensor for '{parameter_name}'; copy the missing files.")
        replace(model, empty, parameter)
        if own_runs is not None:
            own_runs.cut(parameter)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def on_disk(model: nn.Module, parallel: Parallel) -> dict[str, Any]:
    """Where this model's slices go on the disk, and through how large buffers."""
    ranks = world()[1]
    return {
        # DeepSpeed empties the folder before it writes a model there, and a policy's critic is still to come.
        "nvme_path": str(local_path(str(parallel.offload.path)) / f"model-{next(MODELS)}"),
        # A buffer holds the largest slice. DeepSpeed's default is 100 million elements for each of five buffers.
        "buffer_size": max(
            -(-parameter.numel() // (ranks // parallel.expert_parallel_size if expert_share(parameter) else ranks))
            for parameter in model.parameters()
        ),
    }


def wrapped(model: Any, lora: Lora) -> Any:
    """An empty model with adapters that have their first values.

    PEFT makes adapters of a weight's shape and puts them where it is. So meanwhile each weight has the shape that it
    would have on a single process, and one element of memory.
    """
    from align.models.lora.experts import adapt_by_row

    stand_ins = {}
    for empty in list(model.parameters()):
        stand_ins[empty] = nn.Parameter(torch.empty((), dtype=empty.dtype).expand(whole_shape(empty)))
        replace(model, empty, stand_ins[empty])
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    model = add_lora(model, lora, task=task, in_float32=False)  # DeepSpeed keeps float32 weights of its own
    for empty, stand_in in stand_ins.items():
        replace(model, stand_in, empty.requires_grad_(False))
    adapt_by_row(model)
    mark_adapters(model)
    return model


def by_parameter(
    stored: list[StoredTensor], place: Callable[[str], Place]
) -> dict[str, list[tuple[StoredTensor, Place]]]:
    """The stored tensors of each parameter of the model."""
    found: dict[str, list[tuple[StoredTensor, Place]]] = {}
    for tensor in stored:
        where = place(tensor.name)
        found.setdefault(where.parameter, []).append((tensor, where))
    return found


def own_range(parameter: Any, parallel: Parallel) -> tuple[int, int, int]:
    """(first expert of this rank's share, first and last element of its run of the flattened share)."""
    rank, ranks = world()
    share = expert_share(parameter)
    spread = share.ranks if share else 1
    first = (rank % spread) * parameter.shape[0] if share else 0
    if parallel.zero_stage < 3:
        return first, 0, parameter.numel()
    run = math.ceil(parameter.numel() / (ranks // spread))
    start = min(parameter.numel(), rank // spread * run)
    return first, start, min(parameter.numel(), start + run)


def fill(target: Tensor, pieces: list[tuple[StoredTensor, Place]], first: int, start: int, stop: int) -> None:
    """Read elements start to stop of a parameter that holds the experts from `first` on."""
    flat = target.view(-1)
    for tensor, where in pieces:
        if where.expert is None:
            base = 0
        elif first <= where.expert < first + len(target):
            matrix = target[0].numel()
            base = (where.expert - first) * matrix + (where.half or 0) * (matrix // 2)
        else:
            continue
        low, high = max(start, base), min(stop, base + math.prod(tensor.shape))
        if low < high:
            offset = tensor.offset + (low - base) * tensor.dtype.itemsize
            StoredTensor(tensor.name, tensor.file, tensor.dtype, (high - low,), offset).read_into(flat[low:high])


def replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, wherever that stands."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[name] = new
