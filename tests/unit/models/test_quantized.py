"""Weights in 4 bits under adapters.

Witness: a dense model in float32 whose weights were dequantised here, value by value, from the codes.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from align.config.lora import Lora
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.models import quantized
from align.models.family import family_of
from align.models.hunyuan import HunYuanConfig
from align.models.lora.adapters import add_lora
from align.models.lora.describe import WeightRow, weight_rows
from align.models.quantized import LEVELS, Nf4, Quantized, quantize_model, quantized_weights
from align.models.shared_weights import SharedWeights
from align.models.weights import published_weights
from align.run.adapted import trained_on
from align.train.checkpoint import load_policy, load_scorer, save_model
from tests.tiny_families import tiny_config
from tests.unit.models.adapted import SIZES as COMMON
from tests.unit.models.adapted import TOKENS

TOKENIZER = train_tokenizer(["one two three"], 300)
SIZES: dict[str, Any] = COMMON | {"vocab_size": len(TOKENIZER), "initializer_range": 0.1}
FAMILIES = ["hunyuan", "qwen3_moe", "gpt_oss", "llama"]
"""gpt-oss has transposed stacks and biases; Llama has no experts."""
SETTINGS = {"rank": 4, "quantize": "nf4"}


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = HunYuanConfig(**SIZES) if kind == "hunyuan" else tiny_config(kind)
    return family_of(config).policy(config)


def naive(weight: Nf4) -> Tensor:
    values = []
    for place, byte in enumerate(weight.codes.tolist()):
        scale = weight.scales[2 * place // 64].item()
        values += [LEVELS[byte // 16] * scale, LEVELS[byte % 16] * scale]
    return torch.tensor(values, dtype=torch.float64).float().view(weight.shape)


@torch.no_grad()
def dense_copy(dense: Any, model: Any) -> Any:
    """`dense` with the weights that `model` has in 4 bits."""
    modules = dict(model.named_modules())
    for name, parameter in dense.named_parameters():
        module, _, leaf = name.rpartition(".")
        if isinstance(modules[module], Quantized) and leaf in modules[module].quantized:
            parameter.copy_(naive(modules[module].quantized[leaf]))
    return dense


def adapted(model: Any, **settings: Any) -> Any:
    """The model with adapters whose factors are random."""
    torch.manual_seed(2)
    model = add_lora(model, Lora.model_validate(SETTINGS | settings), task="CAUSAL_LM")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=TOKENS, use_cache=False).logits.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    edge = 0.9677083
    positive = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    assert torch.tensor(LEVELS).tolist() == pytest.approx((levels / levels.max()).tolist(), abs=1e-6)


def test_each_value_becomes_the_nearest_level_of_its_block() -> None:
    weight = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    weight[1] *= 100
    weight[2, :4] = 0  # a block of zeros
    nearest = [
        min((level * scale for level in LEVELS), key=lambda candidate: abs(candidate - value))
        for block in weight.view(-1, 64).tolist()
        for scale in [max(map(abs, block))]
        for value in block
    ]
    found = Nf4.of(weight)
    torch.testing.assert_close(found.dense(torch.float32).view(-1), torch.tensor(nearest), atol=1e-6, rtol=1e-6)
    assert torch.equal(found[1].dense(torch.float32), found.dense(torch.float32)[1])
    assert found.bytes == weight.numel() * quantized.BYTES_PER_VALUE


def test_a_large_weight_is_quantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    whole = Nf4.of(weight)
    monkeypatch.setattr(quantized, "CHUNK", 256)
    assert whole.equals(Nf4.of(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_values_equal_those_of_bitsandbytes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    codes, state = library.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=False)
    found = Nf4.of(weight)
    assert torch.equal(found.codes, codes.view(-1))
    assert torch.equal(found.scales, state.absmax)
    expected = library.dequantize_4bit(codes, state)
    assert torch.equal(found.dense(dtype), expected)
    monkeypatch.setattr(quantized, "has_library", lambda: False)
    assert torch.equal(found.dense(dtype), expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_outputs_and_gradients_equal_those_of_the_dequantised_model(kind: str) -> None:
    model = make_model(kind)
    dense = copy.deepcopy(model)
    quantize_model(model)
    dense_copy(dense, model)
    model, dense = adapted(model), adapted(dense)
    for _ in range(2):
        loss, found = gradients(model)
        expected_loss, expected = gradients(dense)
        torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
        assert found.keys() == expected.keys() != set()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)
        with torch.no_grad():
            model.eval()(input_ids=TOKENS)  # the second repetition compares after an evaluation
        model.train()


def test_gradients_reach_the_inputs_after_an_evaluation() -> None:
    linear = nn.Sequential(nn.Linear(64, 8, bias=True))
    quantized.quantize(linear[0], "weight", Nf4.of(linear[0].weight), torch.float32)
    x = torch.randn(4, 64, requires_grad=True)
    linear.eval()(x.detach())
    linear.train()(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, naive(linear[0].quantized["weight"]).sum(0).expand(4, 64))


@pytest.mark.parametrize("kind", ["hunyuan", "gpt_oss"])
def test_autocast_computes_products_in_bf16(kind: str) -> None:
    model = make_model(kind)
    dense = copy.deepcopy(model)
    quantize_model(model)
    dense_copy(dense, model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (m.eval()(input_ids=TOKENS, use_cache=False).logits for m in (model, dense))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_move_leaves_the_weights_in_4_bits() -> None:
    model = make_model("hunyuan")
    quantize_model(model)
    before = [weight.dense(torch.float32) for weight in quantized_weights(model).values()]
    model.to(torch.bfloat16)
    after = quantized_weights(model)
    assert all(weight.scales.dtype == torch.float32 for weight in after.values())
    assert all(torch.equal(a, b.dense(torch.float32)) for a, b in zip(before, after.values(), strict=True))
    stand_ins = [parameter for parameter in model.parameters() if id(parameter) in after]
    assert {parameter.dtype for parameter in stand_ins} == {torch.bfloat16}
    assert {parameter.untyped_storage().nbytes() for parameter in stand_ins} == {2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "base" / "model"
    make_model("hunyuan").save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def load(base: Path, dtype: str = "float32", shared: SharedWeights | None = None, **settings: Any) -> Any:
    return load_policy(base, dtype, lora=Lora.model_validate(SETTINGS | settings), shared=shared)


@pytest.mark.parametrize("kind", FAMILIES)
def test_loading_quantises_all_linear_layers_and_experts(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    rows = {row.group: row for row in weight_rows(loaded)}
    targets = family_of(model.config).lora(model.config)
    linear = (*targets.attention, *targets.mlp)
    sizes = {"routed_experts": 0, "others": 0, "kept": 0}
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(f".{stack}" for stack in targets.experts)):
            sizes["routed_experts"] += parameter.numel()
        elif name.endswith(tuple(f".{layer}.weight" for layer in linear)):
            sizes["others"] += parameter.numel()
        else:
            sizes["kept"] += parameter.numel()
    experts = rows.get("routed_experts", WeightRow("", 0, 0, 0, 0))
    assert experts.quantized == sizes["routed_experts"]
    assert sum(row.quantized for row in rows.values()) - experts.quantized == sizes["others"]
    assert sum(row.kept for row in rows.values()) == sizes["kept"]
    assert rows["attention"].bytes == rows["attention"].quantized * 9 / 16 + 4 * rows["attention"].trained + (
        4 * rows["attention"].kept
    )
    quantize_model(model)
    before, after = (quantized_weights(each).values() for each in (model, loaded))
    assert all(a.equals(b) for a, b in zip(before, after, strict=True))


def test_modules_that_are_trained_in_full_keep_their_precision(base: Path) -> None:
    rows = {row.group: row for row in weight_rows(load(base, modules_to_save=["o_proj"], targets=["routed_experts"]))}
    size = SIZES["hidden_size"] ** 2 * SIZES["num_hidden_layers"]
    assert (rows["attention"].trained, rows["attention"].kept) == (size, size)


def test_models_on_one_base_hold_it_once(base: Path) -> None:
    shared = SharedWeights()
    policy = load(base, shared=shared)
    critic = load_scorer(base, "float32", lora=Lora.model_validate(SETTINGS), shared=shared)
    first, second = ({id(weight) for weight in quantized_weights(model).values()} for model in (policy, critic))
    assert first == second
    frozen = load_policy(base, "float32", frozen=True, shared=shared)
    assert not quantized_weights(frozen)
    assert all(parameter.isfinite().all() for parameter in frozen.parameters())


def test_the_sampler_gets_the_dequantised_weights_and_the_adapter() -> None:
    model = make_model("hunyuan")
    dense = copy.deepcopy(model)
    quantize_model(model)
    dense_copy(dense, model)
    sent = dict(published_weights(adapted(model)))
    merged = dict(published_weights(adapted(dense).merge_and_unload()))
    assert sent.keys() == merged.keys()
    for name in merged:
        torch.testing.assert_close(sent[name], merged[name], atol=1e-6, rtol=1e-5)


def test_a_result_is_an_adapter_of_the_base_that_is_not_quantised(base: Path, tmp_path: Path) -> None:
    model = adapted(make_quantised(base))
    beside = base.parent.parent / "sft"
    save_model(model, TOKENIZER, beside, "float32", save="adapter")
    assert json.loads((beside / "model" / "base.json").read_text())["quantize"] == "nf4"
    assert trained_on(beside / "model") == "nf4"
    expected = published(adapted(load_policy(base, "float32")))
    assert_equal(published(load_policy(beside / "model", "float32")), expected)
    save_model(model, TOKENIZER, tmp_path, "float32", save="merged")
    assert_equal(published(load_policy(tmp_path / "model", "float32")), expected)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    above = load(beside / "model")  # quantises the sum of base and adapter
    name, matrix = "model.layers.0.self_attn.o_proj.weight", Nf4.of(expected["model.layers.0.self_attn.o_proj.weight"])
    assert torch.equal(published(above)[name], matrix.dense(torch.float32))


def make_quantised(base: Path) -> Any:
    model = load_policy(base, "float32")
    quantize_model(model)
    return model


def published(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in published_weights(model)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_experts_that_cannot_be_quantised_are_refused() -> None:
    torch.manual_seed(0)
    config = HunYuanConfig(**SIZES | {"intermediate_size": 9})
    with pytest.raises(UserError, match="not a multiple of 64; remove quantize"):
        quantize_model(family_of(config).policy(config))


def test_a_gpu_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantized, "has_library", lambda: False)
    with pytest.raises(UserError, match=r"run pip install 'align-moe\[qlora\]'"):
        quantized.require_library()


def test_a_product_with_a_stand_in_is_not_a_number() -> None:
    model = make_model("llama")
    quantize_model(model)
    assert math.isnan(model.model.layers[0].self_attn.q_proj.weight.sum())
