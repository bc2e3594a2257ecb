"""Settings that vLLM needs beside a checkpoint's configuration, and models that are refused before it starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedConfig

from align.models.adopted.vllm_fields import vllm_fields
from align.rollout import vllm_options
from align.rollout.refusals import Engine, refusal
from tests.tiny_families import FAMILIES, tiny_config

CPU = Engine("float32", has_gpu=False, longest=128)
GPU = Engine("bfloat16", has_gpu=True, longest=128)
FIELDS = {
    "deepseek_v3": {"scoring_func": "sigmoid"},  # the tiny configuration sets topk_method
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 32, "route_norm": True, "qk_norm": True},
    "glm4_moe_lite": {},  # the tiny configuration sets first_k_dense_replace
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "afmoe": {"score_func": "sigmoid", "route_norm": True},  # the tiny configuration sets the groups
    "lfm2": {"conv_dim": 64, "block_dim": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_vllm_reads(family: str) -> None:
    config = tiny_config(family)
    assert vllm_fields(config) == FIELDS.get(family, {})
    for name, value in vllm_fields(config).items():
        setattr(config, name, value)
    assert vllm_fields(config) == {}


def test_dense_layers_come_first() -> None:
    layers = ["dense", "dense", "sparse"]
    assert vllm_fields(tiny_config("hy_v3", mlp_layer_types=layers))["first_k_dense_replace"] == 2
    assert vllm_fields(tiny_config("hy_v3", mlp_layer_types=["dense"] * 3))["first_k_dense_replace"] == 3
    config = tiny_config("glm4_moe_lite", mlp_layer_types=layers)
    del config.first_k_dense_replace
    assert vllm_fields(config) == {"first_k_dense_replace": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_vllm_runs(family: str) -> None:
    assert refusal(tiny_config(family), CPU) is None
    assert refusal(tiny_config(family), GPU) is None


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: false"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias: true"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: true"),
        ("deepseek_v3", {"kv_lora_rank": 256}, r"of \(512, 64\), but the checkpoint has \(256, 64\)"),
        ("glm4_moe_lite", {"qk_rope_head_dim": 32}, r"has \(512, 32\)"),
        ("lfm2", {"tie_word_embeddings": False}, "vLLM ties its head"),
        ("cohere2", {"sliding_window": 127}, "sliding window 127, which is below rollout.max_model_length 128"),
        ("hy_v3", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "dense layers only before"),
    ],
)
def test_settings_that_vllm_computes_otherwise(family: str, changes: dict[str, object], reason: str) -> None:
    for engine in (CPU, GPU):
        found = refusal(tiny_config(family, **changes), engine)
        assert found is not None
        assert re.search(reason, found)


@pytest.mark.parametrize("model_type", ["phimoe", "minimax", "qwen3_5_text"])
def test_families_that_vllm_cannot_run(model_type: str) -> None:
    config = of_type(model_type)
    assert refusal(config, CPU) is not None
    assert refusal(config, GPU) is not None


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "hy_v4", "qwen3_next"])
def test_families_that_need_a_gpu(model_type: str) -> None:
    assert refusal(of_type(model_type), CPU) is not None
    assert refusal(of_type(model_type), GPU) is None


def test_gated_delta_nets_run_in_bf16_on_a_cpu() -> None:
    assert refusal(of_type("qwen3_next"), Engine("bfloat16", has_gpu=False, longest=128)) is None


def of_type(model_type: str) -> PreTrainedConfig:
    config = PreTrainedConfig()
    config.model_type = model_type
    return config


def test_engine_arguments_of_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(family: str, dtype: str = "float32", *, gpu: bool = False) -> dict[str, object]:
        monkeypatch.setattr(vllm_options, "has_gpu", lambda: gpu)
        tiny_config(family).save_pretrained(tmp_path / family)
        return vllm_options.model_options(tmp_path / family, dtype=dtype)

    assert options("llama") == {}
    fields = {"hf_overrides": {"scoring_func": "sigmoid"}}
    assert options("deepseek_v3") == {**fields, "attention_backend": "CPU_MLA"}
    assert options("deepseek_v3", "bfloat16") == options("deepseek_v3", gpu=True) == fields
    assert options("lfm2_moe") == {"enable_prefix_caching": False}
    assert options("lfm2_moe", gpu=True) == {}
