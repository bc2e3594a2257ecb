"""Names and layout of the published checkpoint, mapped to ours on load and back on save.

Published: one matrix an expert (`mlp.experts.E.gate_proj.weight`), router `mlp.gate.wg.weight`.
Ours: experts stacked (`mlp.experts.gate_up_proj` [E, 2F, D], `mlp.experts.down_proj` [E, D, F]), router
`mlp.gate.weight`.

transformers' loader assembles a stack from matrices that it has read before; ours reads each of them into its slice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.logging import tqdm

from align.errors import UserError
from align.models.hunyuan.configuration import HunYuanConfig
from align.models.hunyuan.weight_files import StoredTensor, stored_tensors, weight_files

READERS = min(4, os.cpu_count() or 1)


class Place(NamedTuple):
    """What a published tensor is in our model: a parameter, or of a stacked one an expert's matrix or half of it."""

    parameter: str
    expert: int | None = None
    half: int | None = None

    def within(self, parameter: Tensor) -> Tensor:
        """The part of the parameter, as a view."""
        if self.expert is None:
            return parameter
        matrix = parameter[self.expert]
        return matrix if self.half is None else matrix.chunk(2)[self.half]


def place(published: str) -> Place:
    """Where the tensor of this published name belongs."""
    expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", published)
    if expert is None:
        return Place(re.sub(r"\.mlp\.gate\.wg\.weight$", ".mlp.gate.weight", published))
    if expert[3] == "down":
        return Place(f"{expert[1]}.down_proj", int(expert[2]))
    return Place(f"{expert[1]}.gate_up_proj", int(expert[2]), ("gate", "up").index(expert[3]))


Pieces = dict[str, list[tuple[StoredTensor, Place]]]
"""Under each parameter's name: the stored tensors that it consists of, and which part each of them is."""


def find_pieces(parameters: Mapping[str, Tensor], stored: Iterable[StoredTensor]) -> tuple[Pieces, set[str]]:
    """The pieces of each parameter, and the stored names that belong to none.

    A base model takes the names of a complete one, and the reverse, as everywhere in transformers. `UserError` for a
    stack of which there are some pieces, but not all.
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
                f"{tensor.file.parent}: the files hold other experts than the {len(parameters[name])} of '{name}'; "
                "copy the missing files, or the config.json that belongs to these."
            )
    return pieces, unused


def read_pieces(pieces: Pieces, parameters: Mapping[str, Tensor]) -> None:
    """Fill the parameters of these names from the files. Peak memory beside them: a few megabytes a reader."""
    found = [
        (tensor, part.within(parameters[name].detach())) for name, parts in pieces.items() for tensor, part in parts
    ]
    found.sort(key=lambda pair: (pair[0].file, pair[0].offset))  # disks like to be read in order
    pool = ThreadPoolExecutor(READERS)
    try:
        jobs = [pool.submit(tensor.read_into, target) for tensor, target in found]
        for job in tqdm(jobs, desc="Loading weights"):
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_weights(model: nn.Module, folder: Path) -> None:
    """Replace a model's weights, where they are, by those of a checkpoint; `UserError` where one is missing."""
    parameters = dict(model.named_parameters())
    pieces, _ = find_pieces(parameters, stored_tensors(weight_files(folder)))
    if missing := sorted(set(parameters) - set(pieces)):
        raise UserError(f"{folder}: there is no tensor for '{missing[0]}'; copy the missing files.")
    read_pieces(pieces, parameters)


def device_for_pieces(model: PreTrainedModel, settings: LoadStateDictConfig) -> torch.device | str | int | None:
    """Where `load_pieces` is to put the model; None where more is asked for than it does: quantization, several
    devices, tensor parallelism, ZeRO-3, other names."""
    devices = set((settings.device_map or {"": "cpu"}).values())
    renamed = len(settings.weight_mapping or []) != len(get_model_conversion_mapping(model))
    more = renamed or settings.is_quantized or settings.device_mesh or settings.dtype_plan or len(devices) > 1
    return None if more or "disk" in devices or is_deepspeed_zero3_enabled() else devices.pop()


def load_pieces(model: nn.Module, files: list[Path], device: torch.device | str | int) -> LoadStateDictInfo:
    """Give the parameters of a model on the meta device memory on `device`, and fill them from the files.

    Those without a stored tensor, or with one of another shape, stay on the meta device and are reported.
    """
    empty = model.state_dict(keep_vars=True)
    pieces, unused = find_pieces(empty, stored_tensors(files))
    misfits = {
        (name, tensor.shape, tuple(part.within(empty[name]).shape))
        for name, parts in pieces.items()
        for tensor, part in parts
        if tensor.shape != part.within(empty[name]).shape
    }
    for name in {name for name, _, _ in misfits}:
        del pieces[name]
    for name in pieces:
        module, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(torch.empty_like(empty[name], device=device), empty[name].requires_grad)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers would draw it anew
        setattr(model.get_submodule(module), leaf, parameter)
    read_pieces(pieces, model.state_dict(keep_vars=True))
    return LoadStateDictInfo(
        missing_keys=set(empty) - set(pieces) - {name for name, _, _ in misfits},
        unexpected_keys=unused,
        mismatched_keys=misfits,  # type: ignore[arg-type]
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def register_published_layout() -> None:
    """Teach transformers' saver the published layout, and its loader, which is used where ours is not."""
    register_checkpoint_conversion_mapping(
        HunYuanConfig.model_type,
        [
            WeightRenaming("mlp.gate.wg.weight", "mlp.gate.weight"),
            WeightConverter(
                source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
                target_patterns="mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns="mlp.experts.*.down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )


def published_shapes(config: HunYuanConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the language model in the published layout."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def mlp(name: str, width: int, bias: bool) -> None:
        linear(f"{name}.gate_proj", width, hidden, bias)
        linear(f"{name}.up_proj", width, hidden, bias)
        linear(f"{name}.down_proj", hidden, width, bias)

    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if config.use_qk_norm:
            norms = ("query_layernorm", "key_layernorm")
            shapes |= {f"{block}.self_attn.{norm}.weight": (config.head_dim,) for norm in norms}
        linear(f"{block}.self_attn.q_proj", heads, hidden, config.attention_bias)
        linear(f"{block}.self_attn.o_proj", hidden, heads, config.attention_bias)
        if config.kv_owner(layer) == layer:
            linear(f"{block}.self_attn.k_proj", kv, hidden, config.attention_bias)
            linear(f"{block}.self_attn.v_proj", kv, hidden, config.attention_bias)
        experts = config.experts_in(layer)
        if experts == 1:
            mlp(f"{block}.mlp", config.intermediate_size, config.mlp_bias)
            continue
        shapes[f"{block}.mlp.gate.wg.weight"] = (experts, hidden)
        for expert in range(experts):
            mlp(f"{block}.mlp.experts.{expert}", config.intermediate_size, False)
        if width := config.shared_width(layer):
            mlp(f"{block}.mlp.shared_mlp", width, config.mlp_bias)
    return shapes


def check_weights(folder: Path, config: HunYuanConfig, *, scorer: bool = False) -> None:
    """Raise `UserError` unless the safetensors files hold exactly the tensors that the configuration asks for.

    Only the files' headers and sizes are looked at, before a model is built; values are checked as they are read.
    scorer: the head is `score.weight`, which may be missing.
    """
    wanted, optional = published_shapes(config), set()
    if scorer or config.tie_word_embeddings:
        optional.add("lm_head.weight")
    if scorer:
        wanted["score.weight"] = (config.num_labels or 1, config.hidden_size)
        optional.add("score.weight")
    found = {tensor.name: tensor.shape for tensor in stored_tensors(weight_files(folder))}
    missing = sorted(set(wanted) - set(found) - optional)
    extra = sorted(name for name in set(found) - set(wanted) if not name.endswith("rotary_emb.inv_freq"))
    if missing:
        others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise UserError(
            f"{folder}: the tensor '{missing[0]}'{others} missing; copy the missing files, or the config.json that "
            "belongs to these."
        )
    if extra:
        others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{folder}: config.json has no place for the tensor '{extra[0]}'{others}; copy the config.json that "
            "belongs to the weights."
        )
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise UserError(
                f"{folder}: the tensor '{name}' has the shape {list(found[name])}, but config.json asks for "
                f"{list(shape)}; copy the config.json that belongs to the weights."
            )
