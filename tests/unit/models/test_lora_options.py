"""Options of the section `lora`: parts to train, DoRA, initialisations, and the table of trained parameters.

Witness: formulas of the papers by hand on the saved tensors, and counts by hand from the sizes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.cli import main
from align.config.lora import Lora
from align.models.family import load_config
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.lora.adapters import add_lora, merge_lora, plain_name, save_adapter
from align.models.lora.describe import table_lines, trained_rows
from align.models.lora.folder import changes, read_adapter, serving_problems, skeleton
from align.models.lora.stream import merge_adapter
from align.models.weights import load_published, published_weights
from align.parallel.sharding import full_shape
from align.plan.shape import shape_of
from align.train.checkpoint import load_policy
from tests.unit.models.adapted import SIZES as COMMON
from tests.unit.models.adapted import TOKENS, moved
from tests.unit.models.adapted import fixed_logprobs as logprobs

SIZES = COMMON | {"use_cla": False}


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    HunYuanForCausalLM(HunYuanConfig(**SIZES)).save_pretrained(tmp_path / "base")
    return load_policy(tmp_path / "base", "float32").eval()


def adapted(plain: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    return add_lora(copy.deepcopy(plain), Lora.model_validate(settings), task="CAUSAL_LM").eval()


def trained(model: Any) -> set[str]:
    return {plain_name(name) for name, p in model.named_parameters() if p.requires_grad}


def test_dora_is_the_papers_formula_in_training_in_rollouts_and_merged(tmp_path: Path, plain: Any) -> None:
    """W' = m (W + s B A) / |W + s B A|, with the norm of each row (Liu et al. 2024, equation 5)."""
    model = moved(adapted(plain, targets=["attention", "shared_expert"], rank=4, alpha=8.0, dora=True))
    found = logprobs(model)
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
    by_hand = copy.deepcopy(plain)
    for name in [name for name in tensors if ".lora_A" in name]:
        module = name.removesuffix(".lora_A.weight")
        weight = by_hand.get_parameter(f"{module}.weight")
        direction = weight + 2.0 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        magnitude = tensors[f"{module}.lora_magnitude_vector"]
        weight.data = magnitude[:, None] * direction / direction.square().sum(1, keepdim=True).sqrt()
    near = {"atol": 1e-5, "rtol": 0.0}
    torch.testing.assert_close(found, logprobs(by_hand), **near)
    assert (found - logprobs(plain)).abs().max() > 0.01
    sent = copy.deepcopy(plain)
    load_published(sent, published_weights(model))  # as weights are sent to a rollout engine
    torch.testing.assert_close(logprobs(sent), found, **near)
    merge_adapter(tmp_path / "base", load_config(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logprobs(load_policy(tmp_path / "merged", "float32").eval()), found, **near)


@pytest.mark.parametrize(
    ("settings", "b_is_zero"),
    [
        ({}, True),
        ({"init": "gaussian"}, True),
        ({"init": "orthogonal", "experts": False, "rank": 4}, False),
        ({"dora": True, "experts": False}, True),
    ],
)
def test_a_new_adapter_does_not_change_the_model(plain: Any, settings: dict[str, Any], b_is_zero: bool) -> None:
    model = adapted(plain, **settings)
    torch.testing.assert_close(logprobs(model), logprobs(plain), atol=1e-5, rtol=0.0)
    factors = dict(model.named_parameters())
    b = factors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    assert (not b.any()) == b_is_zero


def test_gaussian_factors_have_their_own_spread(plain: Any) -> None:
    """PEFT draws A from a normal distribution with the standard deviation 1 / rank; the default is uniform within
    1 / sqrt(inputs)."""
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.default.weight"
    gaussian = dict(adapted(plain, init="gaussian", rank=8).named_parameters())[name]
    assert gaussian.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert gaussian.abs().max() > 3 / 8
    uniform = dict(adapted(plain, rank=8).named_parameters())[name]
    assert uniform.abs().max() <= 24**-0.5


def test_the_default_trains_neither_router_nor_embeddings(tmp_path: Path, plain: Any) -> None:
    model = adapted(plain)
    assert all(".lora_" in name for name in trained(model))
    save_adapter(model, tmp_path / "adapter")
    adapter, bones = read_adapter(tmp_path / "adapter"), skeleton(plain.config)
    assert not list(serving_problems(changes(adapter, bones), adapter, bones))


def test_names_choose_single_layers(plain: Any) -> None:
    model = adapted(plain, targets=["layers.1.*.q_proj", "shared_mlp.up_proj"], rank=2)
    modules = {name.partition(".lora_")[0] for name in trained(model)}
    assert modules == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.shared_mlp.up_proj",
        "model.layers.1.mlp.shared_mlp.up_proj",
    }
    limited = adapted(plain, targets=["q_proj", "down_proj"], layers=[0])
    assert {name.partition(".lora_")[0].rpartition("layers.")[2] for name in trained(limited)} == {
        "0.self_attn.q_proj",
        "0.mlp.shared_mlp.down_proj",
    }


def test_the_head_and_other_modules_are_trained_in_full_and_merged(tmp_path: Path, plain: Any) -> None:
    settings = {
        "targets": ["attention", "lm_head"],
        "modules_to_save": ["input_layernorm", "model.norm"],
        "layers": [1],
    }
    model = moved(adapted(plain, **settings))
    whole = {name for name in trained(model) if ".lora_" not in name}
    assert whole == {"lm_head.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"}
    planned = shape_of("", plain.config.to_dict()).trained_groups(Lora.model_validate(settings))
    assert planned == {"attention": 16 * (64 + 48 + 48 + 64), "lm_head": 64 * 32, "other": 32 + 32}
    found = logprobs(model)
    hidden = model.get_base_model().model(input_ids=TOKENS).last_hidden_state
    scores = model.get_output_embeddings()(hidden[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), 1.0)
    expected = found[:, :-1].gather(-1, TOKENS[:, 1:, None]).flatten()
    torch.testing.assert_close(scores.logprobs_N, expected, atol=1e-5, rtol=0.0)
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "base", load_config(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logprobs(load_policy(tmp_path / "merged", "float32").eval()), found, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(logprobs(merge_lora(model)), found, atol=1e-5, rtol=0.0)


def test_the_table_counts_what_trains(plain: Any) -> None:
    """Heads of size 8: q and o are 32 x 32, k and v 16 x 32. An MLP is three times 24 x 32."""
    groups = {"attention": {"rank": 2}}
    model = adapted(plain, rank=3, groups=groups, train_router=True, modules_to_save=["model.norm"])
    attention = 2 * 2 * (64 + 48 + 48 + 64)
    shared = 2 * 3 * 3 * 56
    experts = 2 * 3 * 4 * ((32 + 48) + (24 + 32))
    assert {row.group: tuple(row)[1:] for row in trained_rows(model, full_shape)} == {
        "attention": (8, "2", attention),
        "shared_expert": (6, "3", shared),
        "routed_experts": (4, "3", experts),
        "router": (2, "full", 256),
        "other": (1, "full", 32),
    }
    total = attention + shared + experts + 256 + 32
    assert total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    *_, last = table_lines(trained_rows(model, full_shape), 100 * total)
    assert last.split() == ["total", "21", f"{total:,}", "1.00%", "of", f"{100 * total:,}"]


def test_align_check_tells_what_trains_and_what_a_router_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe's model: hidden 128, 4 layers with 8 experts; a router is 8 x 128."""
    changes = ["stages.dpo.lora={rank: 8, targets: [attention, router]}", "stages.sft.lora={targets: [q_proj]}"]
    main(["check", "tiny", *changes])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tiny: ok")
    dpo = [line for line in lines if line.startswith("  dpo: ")]
    assert len(dpo) == 2
    assert f"router {4 * 8 * 128:,} (" in dpo[0]
    assert "the policy's router is trained, so the adapter cannot be served beside its base, only merged" in dpo[1]
    (sft,) = (line for line in lines if line.startswith("  sft: "))
    assert sft.endswith("adapters (--data counts them, and loads torch)")
