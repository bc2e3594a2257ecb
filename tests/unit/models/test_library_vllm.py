"""The classes, signatures and attributes of vLLM that our model class relies on. No engine is started."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

from vllm import ModelRegistry
from vllm import _custom_ops as kernels
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCaptureSource
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from align.models.hunyuan.vllm import HunYuanForCausalLM, LiveHead, LiveLinear, MoeBlock


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        (Attention, 3, "num_kv_heads cache_config prefix kv_sharing_target_layer_name"),
        (ColumnParallelLinear, 2, "bias prefix"),
        (MergedColumnParallelLinear, 2, "bias prefix"),
        (QKVParallelLinear, 4, "bias prefix"),
        (RowParallelLinear, 2, "bias prefix"),
        (VocabParallelEmbedding, 2, ""),
        (ParallelLMHead, 2, ""),
        (LogitsProcessor, 1, ""),
        (ParallelLMHead.tie_weights, 2, ""),
        (default_weight_loader, 2, ""),
        (QKVParallelLinear.weight_loader, 4, ""),
        (MergedColumnParallelLinear.weight_loader, 4, ""),
        (UnquantizedLinearMethod.apply, 4, ""),
        (UnquantizedLinearMethod.process_weights_after_loading, 2, ""),
        (UnquantizedEmbeddingMethod.apply, 4, ""),
        (ModelRegistry.register_model, 2, ""),
        (WeightTransferEngineFactory.register_engine, 3, ""),
        (kernels.rms_norm, 4, ""),
        (kernels.fused_add_rms_norm, 4, ""),
        (kernels.rotary_embedding, 6, ""),
        (kernels.cpu_fused_moe, 10, ""),
        (current_platform.is_cpu, 0, ""),
        (CPUAttentionBackend.get_supported_head_sizes, 0, ""),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_a_call_as_we_make_it_fits_the_signature(function: Callable, positional: int, keywords: str) -> None:
    inspect.signature(function).bind(*range(positional), **dict.fromkeys(keywords.split()))


@pytest.mark.parametrize(
    ("owner", "attributes"),
    [
        (Attention.__init__, "self.use_direct_call"),
        (Attention.forward, "self.use_direct_call"),
        (RowParallelLinear.__init__, "weight_loader"),
        (UnquantizedLinearMethod.create_weights, "weight_loader"),
        (VocabParallelEmbedding.__init__, "self.quant_method"),
        (RowParallelLinear.forward, "self.quant_method"),
        (LogitsProcessor._apply_head, "lm_head.quant_method.apply"),
    ],
    ids=lambda value: getattr(value, "__qualname__", value),
)
def test_vllm_reads_the_attributes_that_we_set(owner: Callable, attributes: str) -> None:
    assert attributes in inspect.getsource(owner)


def test_the_methods_that_we_override_exist() -> None:
    for ours, theirs in ((LiveLinear, UnquantizedLinearMethod), (LiveHead, UnquantizedEmbeddingMethod)):
        for name in ("apply", "process_weights_after_loading"):
            assert name in vars(ours)
            assert (
                list(inspect.signature(getattr(ours, name)).parameters)[:2]
                == list(inspect.signature(getattr(theirs, name)).parameters)[:2]
            )


def test_routed_experts_are_captured_by_these_names() -> None:
    wanted = inspect.get_annotations(RoutedExpertsCaptureSource)
    assert wanted.keys() == {"layer_id", "capture_fn"}
    source = inspect.getsource(MoeBlock.__init__)
    assert all(f"self.{name}" in source for name in wanted)


def test_our_class_has_the_interface_that_vllm_checks() -> None:
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.interfaces_base import is_text_generation_model

    assert SupportsLoRA in HunYuanForCausalLM.__mro__
    assert supports_lora(HunYuanForCausalLM)
    assert is_text_generation_model(HunYuanForCausalLM)


def test_the_configuration_has_the_fields_that_we_read() -> None:
    assert {"model_config", "cache_config", "quant_config"} <= VllmConfig.__dataclass_fields__.keys()
