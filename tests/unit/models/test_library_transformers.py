"""The private functions and attributes of transformers that our models rely on."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.initialization import normal_
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from align.models.hunyuan.modeling import HunYuanPreTrainedModel


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        (PreTrainedModel._load_pretrained_model, 4, ""),
        (PreTrainedModel.gradient_checkpointing_enable, 2, ""),
        (PreTrainedModel._from_config, 1, "dtype"),
        (PreTrainedModel.tie_weights, 1, ""),
        (ALL_ATTENTION_FUNCTIONS.get_interface, 2, ""),
        (create_causal_mask, 0, "config inputs_embeds attention_mask past_key_values position_ids"),
        (DynamicCache.update, 4, ""),
        (Cache.get_seq_length, 1, ""),
        (get_model_conversion_mapping, 1, ""),
        (register_checkpoint_conversion_mapping, 2, "overwrite"),
        (WeightRenaming, 2, ""),
        (WeightConverter, 0, "source_patterns target_patterns operations"),
        (MergeModulelist, 0, "dim"),
        (Concatenate, 0, "dim"),
        (
            LoadStateDictInfo,
            0,
            "missing_keys unexpected_keys mismatched_keys error_msgs conversion_errors skipped_pp_keys",
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_a_call_as_we_make_it_fits_the_signature(function: Callable, positional: int, keywords: str) -> None:
    inspect.signature(function).bind(*range(positional), **dict.fromkeys(keywords.split()))


def test_the_loader_calls_the_step_that_we_override_with_these_settings() -> None:
    """`from_pretrained` must call `_load_pretrained_model` with the settings that `device_for_pieces` reads."""
    assert "._load_pretrained_model(" in inspect.getsource(PreTrainedModel.from_pretrained)
    assert {
        "device_map",
        "weight_mapping",
        "device_mesh",
        "dtype_plan",
    } <= LoadStateDictConfig.__dataclass_fields__.keys()
    assert isinstance(inspect.getattr_static(LoadStateDictConfig, "is_quantized"), property)
    given, ours = (
        list(inspect.signature(owner._load_pretrained_model).parameters)[:4]
        for owner in (PreTrainedModel, HunYuanPreTrainedModel)
    )
    assert given == ours


def test_a_parameter_that_is_marked_is_not_initialised_again() -> None:
    assert "_is_hf_initialized" in inspect.getsource(normal_)
    assert "_is_hf_initialized" in inspect.getsource(PreTrainedModel._initialize_missing_keys)


def test_checkpointed_layers_are_switched_by_these_attributes() -> None:
    source = inspect.getsource(GradientCheckpointingLayer)
    assert "self.gradient_checkpointing" in source
    assert "self._gradient_checkpointing_func" in source


@pytest.mark.parametrize(
    "name",
    [
        "_init_weights",
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_sdpa",
        "_tied_weights_keys",
        "base_model_prefix",
        "loss_function",
        "supports_gradient_checkpointing",
    ],
)
def test_the_attributes_that_we_set_or_read_exist(name: str) -> None:
    assert hasattr(PreTrainedModel, name)
