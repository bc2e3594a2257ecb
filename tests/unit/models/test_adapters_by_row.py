"""Adapters on routed experts computed by row: W x + s B A x without a sum as large as the experts.

Witness: weights to which s B A is added by hand, expert by expert, from the tensors of the saved adapter.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from align.config.lora import Lora
from align.models.family import family_of, load_config
from align.models.hunyuan import HunYuanConfig
from align.models.lora.adapters import add_lora, merge_lora
from align.models.lora.experts import RowAdapter
from align.models.lora.stream import merge_adapter
from align.train.checkpoint import load_policy
from tests.tiny_families import tiny_config
from tests.unit.models.adapted import SIZES, logprobs, moved

GROUPS = {
    "attention": {"shared_mlp": False, "experts": False},
    "shared expert": {"attention": False, "experts": False},
    "routed experts": {"attention": False, "shared_mlp": False},
    "all, and the router": {"train_router": True},
}


def base(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    config = HunYuanConfig(**SIZES) if kind == "hunyuan" else tiny_config(kind)
    family_of(config).policy(config).save_pretrained(folder)
    return load_policy(folder, "float32").eval()


def added_by_hand(model: Any, adapter: Path, rank: int, scaling: float) -> Any:
    """A copy of the model with each update added to its weight, in loops over experts."""
    found = copy.deepcopy(model)
    parameters = found.state_dict(keep_vars=True)
    stored = load_file(adapter / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
    for name, a in tensors.items():
        if ".lora_A" not in name:
            if ".lora_B" not in name:
                parameters[name].data.copy_(a)
            continue
        b = tensors[name.replace("lora_A", "lora_B")]
        module = name.removesuffix(".lora_A.weight")
        if not module.removesuffix(".base_layer").endswith("experts"):
            parameters[f"{module}.weight"].data.add_(scaling * b @ a)
            continue
        stack = f"{module}.down_proj" if not module.endswith(".base_layer") else f"{module[:-11]}.gate_up_proj"
        transposed = model.config.model_type == "gpt_oss"
        for expert in range(len(parameters[stack])):
            columns = [rank_index * len(parameters[stack]) + expert for rank_index in range(rank)]
            update = scaling * b[:, columns] @ a[expert * rank : (expert + 1) * rank]
            parameters[stack].data[expert] += update.T if transposed else update
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("group", GROUPS)
def test_naive_by_row_merged_and_peft_are_equal_on_hunyuan(tmp_path: Path, group: str, rank: int, seed: int) -> None:
    four_ways(tmp_path, "hunyuan", Lora(rank=rank, alpha=2.0 * rank, **GROUPS[group]), seed)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize(("rank", "seed"), [(1, 0), (8, 0), (64, 1)])
@pytest.mark.parametrize("group", ["attention", "all, and the router"])
def test_naive_by_row_merged_and_peft_are_equal_on_other_families(
    tmp_path: Path, kind: str, rank: int, seed: int, group: str
) -> None:
    four_ways(tmp_path, kind, Lora(rank=rank, alpha=2.0 * rank, **GROUPS[group]), seed)


def four_ways(tmp_path: Path, kind: str, lora: Lora, seed: int) -> None:
    plain = base(kind, tmp_path / "base")
    ours = moved(add_lora(copy.deepcopy(plain), lora, task="CAUSAL_LM"), seed, std=0.05 if lora.rank < 64 else 0.02)
    ours.save_pretrained(tmp_path / "adapter")
    by_row = logprobs(ours)
    near = {"atol": 1e-4, "rtol": 0.0}
    naive = added_by_hand(plain, tmp_path / "adapter", lora.rank, lora.alpha / lora.rank)
    torch.testing.assert_close(by_row, logprobs(naive), **near)
    assert (by_row - logprobs(plain)).abs().max() > 5e-3
    merge_adapter(tmp_path / "base", load_config(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(by_row, logprobs(load_policy(tmp_path / "merged", "float32").eval()), **near)
    torch.testing.assert_close(by_row, logprobs(merge_lora(ours)), **near)


def test_gradients_are_those_of_peft(tmp_path: Path) -> None:
    """Of the factors and of everything before the experts, also with an expert that gets no token."""
    plain = base("hunyuan", tmp_path / "base")
    for layer in plain.model.layers:
        layer.mlp.gate.weight.data[3] = -10 * layer.mlp.gate.weight.data[:3].sum(0)
    settings = LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    theirs = moved(get_peft_model(copy.deepcopy(plain), settings), 0)
    lora = Lora(rank=4, alpha=8.0, shared_mlp=False)
    ours = add_lora(copy.deepcopy(plain), lora, task="CAUSAL_LM").eval()
    ours.load_state_dict(theirs.state_dict())
    assert any(isinstance(module, RowAdapter) for module in ours.modules())
    for model in (theirs, ours):
        (-logprobs(model)[:, :, 5]).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_stock_peft_loads_what_is_saved_and_back(tmp_path: Path) -> None:
    plain = base("hunyuan", tmp_path / "base")
    ours = moved(add_lora(copy.deepcopy(plain), Lora(rank=4), task="CAUSAL_LM"), 0)
    ours.save_pretrained(tmp_path / "ours")
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(logprobs(stock), logprobs(ours), atol=1e-5, rtol=0.0)
    stock.save_pretrained(tmp_path / "stock")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock"))
    assert {name: tensor.dim() for name, tensor in first.items()} == dict.fromkeys(second, 2)
    assert all(torch.equal(first[name], second[name]) for name in second)
    back = add_lora(copy.deepcopy(plain), Lora(rank=4), task="CAUSAL_LM").eval()
    back.load_adapter(tmp_path / "stock", "default")
    assert torch.equal(logprobs(back), logprobs(ours))


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_stock_peft_loads_an_adapter_whose_names_it_would_move(tmp_path: Path, kind: str) -> None:
    """PEFT takes `gate_proj` of these families for the experts' old name; the saved settings avoid that."""
    from align.models.lora.adapters import save_adapter

    plain = base(kind, tmp_path / "base")
    ours = moved(add_lora(copy.deepcopy(plain), Lora(rank=4), task="CAUSAL_LM"), 0)
    save_adapter(ours, tmp_path / "ours")
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(logprobs(stock), logprobs(ours), atol=1e-5, rtol=0.0)
    assert (logprobs(ours) - logprobs(plain)).abs().max() > 5e-3


def test_several_adapters_are_switched_summed_and_disabled(tmp_path: Path) -> None:
    plain = base("hunyuan", tmp_path / "base")
    lora = Lora(rank=4)
    singles = {}
    for seed, name in enumerate(("one", "two")):
        single = moved(add_lora(copy.deepcopy(plain), lora, task="CAUSAL_LM"), seed)
        single.save_pretrained(tmp_path / name)
        singles[name] = logprobs(single)
    both = add_lora(copy.deepcopy(plain), lora, task="CAUSAL_LM").eval()
    for name, expected in singles.items():
        both.load_adapter(tmp_path / name, name)
        both.set_adapter(name)
        torch.testing.assert_close(logprobs(both), expected, atol=1e-5, rtol=0.0)
    both.base_model.set_adapter(["one", "two"])
    summed = logprobs(both)
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "one", "one").eval()
    stock.load_adapter(tmp_path / "two", "two")
    stock.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(summed, logprobs(stock), atol=1e-5, rtol=0.0)
    with both.disable_adapter():
        torch.testing.assert_close(logprobs(both), logprobs(plain), atol=1e-6, rtol=0.0)
    both.merge_adapter(["one"])
    torch.testing.assert_close(logprobs(both), singles["one"], atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("autocast", [True, False])
def test_float32_factors_work_on_a_bfloat16_base(tmp_path: Path, autocast: bool) -> None:
    plain = base("hunyuan", tmp_path / "base")
    lora = Lora(rank=4)
    single = moved(add_lora(copy.deepcopy(plain), lora, task="CAUSAL_LM"), 0)
    single.save_pretrained(tmp_path / "adapter")
    expected = logprobs(single)
    ours = add_lora(copy.deepcopy(plain).to(torch.bfloat16), lora, task="CAUSAL_LM").eval()
    ours.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = logprobs(ours)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert (found - expected).abs().mean() < 0.1 * (found - logprobs(plain)).abs().mean()
    found.sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_ranks_alphas_and_layers_of_groups_reach_linear_layers_and_stacks(tmp_path: Path) -> None:
    """PEFT by itself ignores `layers_to_transform` for stacks and for modules that are trained in full."""
    groups = {"attention": {"rank": 2}, "routed_experts": {"rank": 3, "alpha": 12.0}}
    lora = Lora.model_validate(
        {"rank": 4, "alpha": 8.0, "rslora": True, "layers": [1], "groups": groups, "train_router": True}
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # PEFT warns about the patterns of stacks, which it applies, as the scaling below shows
        model = add_lora(base("hunyuan", tmp_path / "base"), lora, task="CAUSAL_LM")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".layers.1." in name for name in trained)
    assert any("experts" in name for name in trained)
    assert any("mlp.gate." in name for name in trained)
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    scaling = {name.rpartition(".")[2]: module.scaling["default"] for name, module in layers}
    assert scaling["q_proj"] == pytest.approx(8 / 2**0.5)
    assert scaling["up_proj"] == pytest.approx(8 / 4**0.5)
    assert scaling["experts"] == pytest.approx(12 / 3**0.5)


def test_targets_set_the_keys_of_earlier_recipes() -> None:
    chosen = Lora.model_validate({"targets": ["attention", "router"]})
    keys = ("attention", "shared_mlp", "experts", "train_router", "train_embeddings")
    assert [getattr(chosen, key) for key in keys] == [True, False, False, True, False]
    assert Lora.model_validate(chosen.model_dump()) == chosen
    assert Lora.model_validate({"targets": ["all-linear"]}).experts
