"""Adapters on disk: merging file by file, removing, extracting and combining, against PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from align import cli
from align.models.family import family_of, load_config
from align.models.hunyuan import HunYuanConfig
from align.models.lora.build import combine_adapters, extract_adapter
from align.models.lora.folder import PREFIX
from align.models.lora.stream import merge_adapter
from tests.tiny_families import tiny_config

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
OTHER_TARGETS = {
    "gpt_oss": (["q_proj", "o_proj"], STACKS),
    "phi3": (["qkv_proj", "gate_up_proj", "down_proj"], []),
}
TOKENS = torch.arange(3, 15)[None]


def make_base(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save a tiny model of a family in several files; return it."""
    torch.manual_seed(0)
    config: Any = (
        HunYuanConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            moe_topk=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
        if kind == "hunyuan"
        else tiny_config(kind, **changes)
    )
    model = family_of(config).policy(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    return family_of(config).policy.from_pretrained(folder, dtype=dtype).eval()


def adapt(model: Any, folder: Path, *, seed: int = 1, **settings: Any) -> Any:
    """Wrap a model by stock PEFT, move every trained value at random and save the adapter; return the wrapped model."""
    wrapped = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM"} | settings), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_magnitude" in name or (parameter.requires_grad and "lora_" not in name):
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        elif "lora_" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


SECOND_LAYER = r"layers\.1\..*(q_proj|qkv_proj|o_proj)"


# PEFT applies its own patterns for the experts' stacks, but compares them with the names of modules only.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match.*gate_up_proj'\\]")
@pytest.mark.parametrize(
    "kind", ["hunyuan", "llama", "phi3", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"]
)
def test_a_merge_is_bit_for_bit_that_of_peft(tmp_path: Path, kind: str) -> None:
    model = make_base(tmp_path / "base", kind)
    modules, parameters = OTHER_TARGETS.get(kind, (LINEAR, STACKS if kind in ("hunyuan", "deepseek_v3") else []))
    if kind == "mixtral":
        modules = ["q_proj", "w1", "w2", "w3"]  # names of its former modules, which PEFT moves to the stacks
    wrapped = adapt(
        model,
        tmp_path / "adapter",
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=modules,
        target_parameters=parameters or None,
        rank_pattern={SECOND_LAYER: 2},
        alpha_pattern={SECOND_LAYER: 9},
        modules_to_save=["lm_head"],
    )
    report = merge_adapter(tmp_path / "base", load_config(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "expected")
    expected, found, base = (tensors(tmp_path / name) for name in ("expected", "merged", "base"))
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    changed = [name for name in base if not torch.equal(base[name], expected[name])]
    assert (report.changed, report.copied) == (len(changed), len(base) - len(changed))
    assert 0 < report.copied < len(base)


def test_a_bfloat16_merge_is_rounded_once(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "hunyuan", torch.bfloat16)
    adapt(model, tmp_path / "adapter", r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=STACKS)
    report = merge_adapter(tmp_path / "base", load_config(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    base, found, factors = tensors(tmp_path / "base"), tensors(tmp_path / "merged"), tensors(tmp_path / "adapter")
    a, b = (factors[f"{PREFIX}model.layers.1.mlp.experts.lora_{kind}.weight"].float() for kind in "AB")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    exact = base[name].double() + 2 * b[:, 2::4].double() @ a[4:6].double()
    assert torch.equal(found[name], exact.float().to(torch.bfloat16))
    assert 1e-4 < report.relative_rounding < 2e-2


def test_dora_is_merged(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "llama")
    wrapped = adapt(model, tmp_path / "adapter", r=2, target_modules=["q_proj", "down_proj"], use_dora=True)
    before = logits(wrapped)
    merge_adapter(tmp_path / "base", load_config(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)
    assert (logits(type(model).from_pretrained(tmp_path / "base").eval()) - before).abs().max() > 0.01


def test_a_merged_adapter_is_removed(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "qwen3_moe")
    adapt(model, tmp_path / "adapter", r=2, target_modules=LINEAR)
    cli.main(["adapter", "merge", *(str(tmp_path / name) for name in ("adapter", "merged"))])
    cli.main(["adapter", "unmerge", *(str(tmp_path / name) for name in ("adapter", "merged", "back"))])
    base, merged, back = (tensors(tmp_path / name) for name in ("base", "merged", "back"))
    for name, values in base.items():
        torch.testing.assert_close(back[name], values, atol=1e-7, rtol=1e-6)
    assert max((merged[name] - values).abs().max() for name, values in base.items()) > 0.01


def test_results_of_the_commands_as_json(tmp_path: Path, capsys) -> None:
    """Two layers with the projections q and v: four parameters change."""
    model = make_base(tmp_path / "base", "llama")
    adapt(model, tmp_path / "adapter", r=2, target_modules=["q_proj", "v_proj"])
    folders = {name: str(tmp_path / name) for name in ("base", "adapter", "merged", "back", "extracted", "both")}

    def result(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        cli.main(["adapter", *words, "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    count = 2 * model.config.num_hidden_layers
    checked = result("check", folders["adapter"], "--base", folders["base"])
    assert (checked["parameters"], checked["not_served"]) == (count, [])
    assert result("merge", folders["adapter"], folders["merged"], "--base", folders["base"])["changed"] == count
    assert result("unmerge", folders["adapter"], folders["merged"], folders["back"])["changed"] == count
    extracted = result("extract", folders["base"], folders["merged"], folders["extracted"], "--rank", "2")
    assert extracted["errors"]["attention"]["2"] < 1e-3  # the difference has rank 2
    words = (
        "combine",
        folders["adapter"],
        folders["extracted"],
        "--target",
        folders["both"],
        "--base",
        folders["base"],
    )
    assert result(*words)["target"] == folders["both"]


def test_a_reward_models_adapter_is_merged_into_its_language_model(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "llama")
    scorer = family_of(model.config).scorer
    loaded = scorer.from_pretrained(tmp_path / "base", num_labels=1)
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["score"]}
    wrapped = adapt(loaded, tmp_path / "adapter", task_type="SEQ_CLS", **settings)
    merge_adapter(tmp_path / "base", load_config(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    merged = scorer.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_labels == 1
    torch.testing.assert_close(logits(merged), logits(wrapped), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hunyuan", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_low_rank_difference_is_extracted_and_stock_peft_loads_it(tmp_path: Path, kind: str) -> None:
    model = make_base(tmp_path / "base", kind)
    modules, parameters = OTHER_TARGETS.get(kind, (["q_proj"], STACKS))
    tuned = adapt(
        model, tmp_path / "adapter", r=2, target_modules=modules, target_parameters=parameters, modules_to_save=["norm"]
    ).merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    config = load_config(tmp_path / "base")
    errors, rest = extract_adapter(tmp_path / "base", tmp_path / "tuned", config, tmp_path / "found", 2, copy_rest=True)
    assert errors["attention"].relative(2) < 1e-3
    assert errors["routed_experts"].relative(2) < 1e-3
    assert errors["routed_experts"].relative(1) > 0.1
    assert set(rest) == {"other"}
    base = type(tuned).from_pretrained(tmp_path / "base").eval()
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "found").eval()), logits(tuned), atol=1e-4, rtol=1e-4
    )


def test_the_error_by_rank_is_what_the_singular_values_leave(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama")
    (tmp_path / "tuned").mkdir()
    name, generator = "model.layers.1.mlp.up_proj.weight", np.random.default_rng(0)
    for file in (tmp_path / "base").iterdir():
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    difference = generator.normal(size=(128, 64)).astype("float32")
    for file in (tmp_path / "tuned").glob("*.safetensors"):
        values = load_file(file)
        if name in values:
            save_file(values | {name: values[name] + torch.from_numpy(difference)}, file, metadata={"format": "pt"})
    errors, rest = extract_adapter(
        tmp_path / "base", tmp_path / "tuned", load_config(tmp_path / "base"), tmp_path / "x", 8, copy_rest=False
    )
    singular = np.linalg.svd(difference, compute_uv=False)
    for rank in (1, 2, 4, 8):
        expected = np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())
        assert errors["shared_expert"].relative(rank) == pytest.approx(expected, rel=1e-4)
    assert rest == {}


def combined(tmp_path: Path, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The merged tensors of two combined adapters, and the errors."""
    config = load_config(tmp_path / "base")
    errors = combine_adapters(
        [tmp_path / "one", tmp_path / "two"], [0.7, -0.4], config, tmp_path / "both", tmp_path / "base", **options
    )
    merge_adapter(tmp_path / "base", config, tmp_path / "both", tmp_path / "merged")
    return tensors(tmp_path / "merged"), errors


def test_a_linear_combination_is_the_weighted_sum_of_the_updates(tmp_path: Path) -> None:
    """Also of adapters with other targets and ranks."""
    make_base(tmp_path / "base", "hunyuan")
    shares = {"one": 0.7, "two": -0.4}
    expected = {name: values.double() for name, values in tensors(tmp_path / "base").items()}
    for name, parameters in (("one", STACKS), ("two", STACKS[1:])):
        model = type(make_base(tmp_path / "again", "hunyuan")).from_pretrained(tmp_path / "base")
        wrapped = adapt(
            model, tmp_path / name, r=3, seed=len(parameters), target_modules=["q_proj"], target_parameters=parameters
        )
        wrapped.merge_and_unload().save_pretrained(tmp_path / "single")
        base = tensors(tmp_path / "base")
        for key, values in tensors(tmp_path / "single").items():
            expected[key] += shares[name] * (values.double() - base[key].double())
    found, errors = combined(tmp_path)
    assert errors == {}
    for key, values in expected.items():
        torch.testing.assert_close(found[key].double(), values, atol=1e-6, rtol=1e-5)
    one = combined(tmp_path, rank=2)[1]
    assert 0.05 < one["routed_experts"].relative(2) < 0.9


def test_ties_is_that_of_peft(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "llama")
    wrapped = adapt(model, tmp_path / "one", r=4, target_modules=["q_proj", "up_proj"])
    PeftModel.save_pretrained(wrapped, tmp_path / "one")
    fresh = type(model).from_pretrained(tmp_path / "base")
    adapt(fresh, tmp_path / "two", r=4, seed=5, target_modules=["q_proj", "up_proj"])
    both = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "one", "one")
    both.load_adapter(tmp_path / "two", "two")
    both.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", "ties_svd", svd_rank=4, density=0.5)
    both.set_adapter("both")
    both.merge_and_unload(adapter_names=["both"]).save_pretrained(tmp_path / "expected")
    found, errors = combined(tmp_path, method="ties", density=0.5, rank=4)
    base = tensors(tmp_path / "base")
    for name, values in tensors(tmp_path / "expected").items():
        torch.testing.assert_close(found[name], values, atol=1e-5, rtol=1e-4)
    assert not torch.equal(
        found["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )
    assert errors["attention"].relative(4) > 0.05


def test_info_counts_the_parameters_of_each_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_base(tmp_path / "base", "hunyuan")
    adapt(
        model, tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=STACKS, modules_to_save=["gate"]
    )
    cli.main(["adapter", "info", str(tmp_path / "adapter"), "--json"])
    said = json.loads(capsys.readouterr().out)
    groups = {row["group"]: (row["tensors"], row["rank"], row["parameters"]) for row in said["groups"]}
    # Four layers; q_proj is 32 x 32, an expert 48 x 32 and 32 x 24, the router 4 x 32.
    assert groups == {
        "attention": (4, "2", 4 * 2 * (32 + 32)),
        "routed_experts": (8, "2", 4 * 4 * 2 * (48 + 32 + 32 + 24)),
        "router": (4, "full", 4 * 4 * 32),
    }
    assert said["not_served"] == ["it trains in full: router"]


@pytest.mark.slow  # imports TRL
def test_an_adapter_that_trl_trained_is_checked_merged_and_trained_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from align.config.lora import Lora
    from align.data.tokenizer import train_tokenizer
    from align.models.lora.adapters import add_lora

    base = make_base(tmp_path / "base", "llama")
    rows = Dataset.from_list([{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))}] * 4)
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=None,
        max_steps=3,
        learning_rate=0.05,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer: Any = SFTTrainer(
        base,
        args=settings,
        train_dataset=rows,
        processing_class=train_tokenizer(["a b"], 300),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        ),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    plain = make_base(tmp_path / "base", "llama")
    expected = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
    cli.main(["adapter", "check", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")])
    assert "12 parameters change" in capsys.readouterr().out  # three layers
    merge_adapter(tmp_path / "base", load_config(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    policy = family_of(plain.config).policy
    merged = policy.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0.0)
    ours = add_lora(make_base(tmp_path / "base", "llama"), Lora(rank=4, alpha=8.0, shared_mlp=False), task="CAUSAL_LM")
    assert (logits(ours) - expected).abs().max() > 1e-2
    ours.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    torch.testing.assert_close(logits(ours.eval()), expected, atol=1e-5, rtol=0.0)
