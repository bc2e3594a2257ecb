"""Weights under published names: read from safetensors files, checked against a configuration, yielded one by one."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils.logging import tqdm

from align.errors import UserError
from align.models.family import Place, family_of
from align.models.lora.merge import merged_parameters, plain_buffers
from align.models.weight_files import StoredTensor, stored_tensors, weight_files

READERS = min(4, os.cpu_count() or 1)
"""Threads that read weights."""

Pieces = dict[str, list[tuple[StoredTensor, Place]]]
"""{name of our parameter: the stored tensors that fill it, each with the part that it fills}."""


@torch.no_grad()
def published_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of every weight of a model, plain or wrapped by PEFT, with adapters merged on the fly.

    Stacked experts are split into one matrix per expert and projection. Tensors may be views of the model's parameters:
    copy them before the next training step. A tied head is omitted.
    """
    names = family_of(model.config).names(model.config)
    for name, tensor in chain(merged_parameters(model), dict(plain_buffers(model)).items()):
        yield from names.published(name, tensor)


def stored_state(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model, by name; a shared parameter once."""
    return {**dict(model.named_parameters()), **dict(plain_buffers(model))}


def empty_model(model_class: Any, config: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model with allocated buffers and parameters on the meta device, to be filled from `folder`.

    The dtypes are those of `from_pretrained`, which keeps some of a family's tensors in float32: the correction bias of
    a router in bf16 would choose other experts.
    """
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, dtype=dtype)
    model.name_or_path = str(folder)
    model.tie_weights()
    for key, kept in model._get_dtype_plan(dtype).items():
        for name, tensor in stored_state(model).items():
            if re.search(rf"(^|\.){re.escape(key)}(\.|$)", name):
                tensor.data = tensor.data.to(kept)
    return model


def load_generation_config(model: Any, folder: Path) -> None:
    """Set a language model's generation settings to those of the checkpoint, if it has any."""
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replace the parameter `old` by `new` in every module that has it."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[name] = new


@torch.no_grad()
def load_published(model: Any, named_tensors: Iterator[tuple[str, Tensor]]) -> int:
    """Copy published weights into the parameters of a model without adapters; returns the size of the weights in bytes.

    Raises `ValueError` for an unknown name and for parameters that remain incomplete.
    """
    place = family_of(model.config).names(model.config).place
    parameters = stored_state(model)
    missing = {id(parameter): parameter.numel() for parameter in parameters.values()}
    tied = getattr(model.config, "tie_word_embeddings", False)
    size = 0
    for name, tensor in named_tensors:
        if name == "lm_head.weight" and tied:
            continue
        part = place(name)
        if part.parameter not in parameters:
            raise ValueError(f"the weight '{name}' is not part of this model")
        parameter = parameters[part.parameter]
        part.within(parameter).copy_(tensor)
        missing[id(parameter)] -= tensor.numel()
        size += tensor.numel() * tensor.element_size()
    incomplete = [name for name, parameter in parameters.items() if missing[id(parameter)]]
    if incomplete:
        raise ValueError(f"weights are missing for {', '.join(incomplete[:5])}")
    return size


def find_pieces(
    parameters: Mapping[str, Tensor], stored: Iterable[StoredTensor], place: Callable[[str], Place]
) -> tuple[Pieces, set[str]]:
    """The pieces of each parameter, and the names of stored tensors that fit no parameter.

    As in transformers, a trunk also accepts the names of a complete model, and vice versa. Raises `UserError` for an
    incomplete stack of experts.
    """
    pieces: Pieces = {}
    unused = set()
    for tensor in stored:
        found = place(tensor.name)
        names = (found.parameter, f"model.{found.parameter}", found.parameter.removeprefix("model."))
        name = next((name for name in names if name in parameters), None)
        if name is None:
            unused.add(tensor.name)
        else:
            pieces.setdefault(name, []).append((tensor, found._replace(parameter=name)))
    for name, parts in pieces.items():
        tensor, part = parts[0]
        if part.expert is None:
            continue
        found_parts = {(part.expert, part.half) for _, part in parts}
        halves = [None] if part.half is None else [0, 1]
        if found_parts != {(expert, half) for expert in range(len(parameters[name])) for half in halves}:
            raise UserError(
                f"{tensor.file.parent}: the files do not have the {len(parameters[name])} experts of '{name}'; "
                "copy the missing files, or the config.json that belongs to the weights."
            )
    return pieces, unused


def read_pieces(pieces: Pieces, parameters: Mapping[str, Tensor]) -> None:
    """Fill the parameters in `pieces` from the files. Each reader thread needs a buffer of at most `CHUNK` values."""
    found = [
        (tensor, part.within(parameters[name].detach())) for name, parts in pieces.items() for tensor, part in parts
    ]
    found.sort(key=lambda pair: (pair[0].file, pair[0].offset))  # sequential reads are faster
    pool = ThreadPoolExecutor(READERS)
    try:
        jobs = [pool.submit(tensor.read_into, target) for tensor, target in found]
        for job in tqdm(jobs, desc="Loading weights"):
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_range(target: Tensor, parts: list[tuple[StoredTensor, Place]], first: int, start: int, stop: int) -> None:
    """Read elements `start` to `stop` of the flattened parameter `target`.

    first: index of the first expert in `target`, if it is a stack of experts.
    """
    flat = target.view(-1)
    for tensor, where in parts:
        if where.expert is None:
            base = -first * (target[0].numel() if first else 0)  # a tensor of all experts starts before this rank's
        elif first <= where.expert < first + len(target):
            matrix = target[0].numel()
            base = (where.expert - first) * matrix + (where.half or 0) * (matrix // 2)
        else:
            continue
        low, high = max(start, base), min(stop, base + math.prod(tensor.shape))
        if low < high:
            offset = tensor.offset + (low - base) * tensor.dtype.itemsize
            StoredTensor(tensor.name, tensor.file, tensor.dtype, (high - low,), offset).read_into(flat[low:high])


def read_weights(model: Any, folder: Path) -> None:
    """Overwrite a model's weights in place with those of a checkpoint; `UserError` if weights are missing."""
    parameters, place = stored_state(model), family_of(model.config).names(model.config).place
    pieces, _ = find_pieces(parameters, stored_tensors(weight_files(folder)), place)
    if missing := sorted(set(parameters) - set(pieces)):
        raise UserError(f"{folder}: the weights of '{missing[0]}' are missing; copy the missing files.")
    read_pieces(pieces, parameters)


def check_weights(folder: Path, config: Any, *, scorer: bool = False) -> None:
    """Raise `UserError` unless the safetensors files hold exactly the tensors of a model with this configuration.

    Only the files' headers and sizes are read. Values are checked when they are loaded. Tensors that the family's class
    ignores, such as DeepSeek's layers for multi-token prediction, may be present.
    scorer: for a reward model or critic. Both `score.weight` and `lm_head.weight` may then be missing.
    """
    wanted, optional = family_of(config).published_shapes(config), set()
    if scorer or config.tie_word_embeddings:
        optional.add("lm_head.weight")
    if scorer:
        wanted["score.weight"] = (config.num_labels or 1, config.hidden_size)
        optional.add("score.weight")
    found = {tensor.name: tensor.shape for tensor in stored_tensors(weight_files(folder))}
    missing = sorted(set(wanted) - set(found) - optional)
    ignored = [r"rotary_emb\.inv_freq$", *(family_of(config).policy._keys_to_ignore_on_load_unexpected or [])]
    extra = sorted(name for name in set(found) - set(wanted) if not any(re.search(key, name) for key in ignored))
    if missing:
        others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise UserError(
            f"{folder}: the tensor '{missing[0]}'{others} missing; copy the missing files, or the config.json that "
            "belongs to the weights."
        )
    if extra:
        others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{folder}: a model with this config.json has no tensor '{extra[0]}'{others}; copy the config.json that "
            "belongs to the weights."
        )
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise UserError(
                f"{folder}: the tensor '{name}' has the shape {list(found[name])}, but config.json requires "
                f"{list(shape)}; copy the config.json that belongs to the weights."
            )
