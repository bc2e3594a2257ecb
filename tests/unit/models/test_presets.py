"""Parameter counts of the presets against arithmetic by hand, and cache sizes against allocated bytes."""

from __future__ import annotations

import json

import pytest
import torch

from align import cli
from align.config.presets import CONFIG_KEYS, PRESETS
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.plan.cost import model_cost
from align.plan.shape import shape_of
from tests.tiny_families import save_tiny


def test_hunyuan_large_counts_as_the_report_does() -> None:
    cost = model_cost(shape_of("hunyuan-large", PRESETS["hunyuan-large"]))
    layers, h, f, n_kv, d, vocabulary = 64, 6400, 18_304, 8, 80, 128_512
    attention = layers * 2 * h * h + layers // 2 * 2 * h * n_kv * d
    norms = layers * (2 * h + 2 * d) + h
    expert = layers * 3 * h * f
    rest = attention + layers * 16 * h + vocabulary * h + norms
    assert cost.parameters == rest + 17 * expert
    assert cost.active_parameters == rest + 2 * expert
    assert round(cost.parameters / 1e9, 1) == 388.7
    assert round(cost.active_parameters / 1e9, 1) == 51.3
    assert (cost.cache_bytes_per_token, cost.cache_bytes_unshared) == (81_920, 163_840)
    assert cost.cache_bytes_per_token / cost.cache_bytes_multi_head == 0.05


@pytest.mark.parametrize("name", ["tiny", "small", "medium"])
def test_other_presets_have_the_active_size_they_promise(name) -> None:
    active = model_cost(shape_of(name, PRESETS[name])).active_parameters
    low, high = {"tiny": (0.5e6, 2e6), "small": (0.08e9, 0.12e9), "medium": (0.8e9, 1.3e9)}[name]
    assert low < active < high


def test_flops_are_those_that_torch_counts() -> None:
    """Expected: torch's FLOP counter on a forward pass of `tiny`. Eager attention also computes masked scores."""
    from torch.utils.flop_counter import FlopCounterMode

    config = HunYuanConfig(**PRESETS["tiny"])
    model = HunYuanForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    tokens = 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 1024, (1, tokens)), use_cache=False)
    cost = model_cost(shape_of("tiny", PRESETS["tiny"]), context=tokens)
    assert counter.get_total_flops() == tokens * cost.flops_per_token


@pytest.mark.parametrize("changes", [{}, {"use_cla": False}, {"cla_share_factor": 3}, {"tie_word_embeddings": False}])
def test_the_cache_formula_is_what_is_allocated(changes) -> None:
    config = HunYuanConfig(**(PRESETS["tiny"] | changes))
    model = HunYuanForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(0, 1024, (2, 7)), use_cache=True).past_key_values
    held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    cost = model_cost(shape_of("tiny", config.to_dict()))
    assert cost.cache_bytes_per_token * 2 * 7 == 2 * held  # bf16 has two bytes


def test_show_model_prints_a_preset_and_a_folder(tmp_path, capsys) -> None:
    cli.main(["show-model", "tiny", "--json"])
    preset = json.loads(capsys.readouterr().out)
    HunYuanConfig(**PRESETS["tiny"]).save_pretrained(tmp_path)
    cli.main(["show-model", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == preset
    cli.main(["show-model", "hunyuan-large"])
    assert "388.7B" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_show_model_prints_a_folder_of_any_family(tmp_path, capsys, model_type) -> None:
    tiny = save_tiny(model_type, tmp_path)
    capsys.readouterr()
    cli.main(["show-model", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(parameter.numel() for parameter in tiny.parameters())
    cli.main(["show-model", str(tmp_path)])
    assert "cache" in capsys.readouterr().out


def test_show_model_refuses_what_is_neither(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["show-model", "hunyuan-huge"])
    assert stopped.value.code == 2
    assert "neither a preset" in capsys.readouterr().err


def test_the_keys_of_recipes_are_the_configurations_fields() -> None:
    assert tuple(vars(HunYuanConfig)["__annotations__"]) == CONFIG_KEYS
