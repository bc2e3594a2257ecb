"""Load and save HunYuan models with transformers' `from_pretrained` and `save_pretrained`.

transformers' loader reads the matrices of all experts before it assembles their stack. Our loader reads each matrix
into its slice of the stack, so no weight is in memory twice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from align.models.family import family_of
from align.models.hunyuan.layout import PUBLISHED_ROUTER, ROUTER, STACKS
from align.models.weight_files import stored_tensors
from align.models.weights import find_pieces, read_pieces


def conversion() -> list[WeightConverter | WeightRenaming]:
    """Converters between the published layout and ours, for transformers' saver and, without `load_pieces`, its
    loader."""
    found: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(PUBLISHED_ROUTER.removeprefix("."), ROUTER.removeprefix("."))
    ]
    for stack, projections in STACKS.items():
        found.append(
            WeightConverter(
                source_patterns=[f"mlp.experts.*.{projection}.weight" for projection in projections],
                target_patterns=f"mlp.experts.{stack}",
                operations=[MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(projections) > 1 else [])],
            )
        )
    return found


def device_for_pieces(model: PreTrainedModel, settings: LoadStateDictConfig) -> torch.device | str | int | None:
    """Device on which `load_pieces` puts the model; None if transformers' own loader is needed.

    It is needed for quantization, several devices, offloading to disk, tensor parallelism, a dtype plan, ZeRO-3 and
    renamed weights.
    """
    devices = set((settings.device_map or {"": "cpu"}).values())
    renamed = len(settings.weight_mapping or []) != len(get_model_conversion_mapping(model))
    more = renamed or settings.is_quantized or settings.device_mesh or settings.dtype_plan or len(devices) > 1
    return None if more or "disk" in devices or is_deepspeed_zero3_enabled() else devices.pop()


def load_pieces(model: PreTrainedModel, files: list[Path], device: torch.device | str | int) -> LoadStateDictInfo:
    """Move a model from the meta device to `device`: allocate its parameters there and fill them from the files.

    Parameters without a stored tensor, or whose stored tensor has another shape, stay on the meta device and are
    reported.
    """
    empty = model.state_dict(keep_vars=True)
    pieces, unused = find_pieces(empty, stored_tensors(files), family_of(model.config).names(model.config).place)
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
        # Without this mark transformers would initialise the parameter again.
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
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
