"""Sizes of any family against transformers' own models, published numbers, and the tensors that torch saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from align.config import load_recipe
from align.config.lora import Lora
from align.config.presets import PRESETS
from align.models.family import family_of
from align.models.lora.adapters import add_lora
from align.models.packing import Packing
from align.models.upcycling import upcycle
from align.plan.activations import Pass, layer_bytes
from align.plan.job import jobs_of
from align.plan.shape import shape_of
from align.plan.sizes import ModelShape
from tests.tiny_families import FAMILIES, save_tiny, tiny_config, tiny_model

EXPERTS, TOP_K = 8, 2
"""Experts of the tiny mixtures, and experts per token (llama4_text has one)."""
SEAMS = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"]


def shape(model_type: str, **changes: Any) -> ModelShape:
    return shape_of(model_type, tiny_config(model_type, **changes).to_dict())


def plain_model(config: Any) -> Any:
    """transformers' own model, without memory."""
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_equal_those_of_transformers(model_type: str) -> None:
    model, found = plain_model(tiny_config(model_type)), shape(model_type)
    assert found.parameters() == sum(parameter.numel() for parameter in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert [layer.parameters for layer in found.layers] == layers
    share = (1 if model_type == "llama4_text" else TOP_K) / EXPERTS
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert found.experts == routed
    assert found.active == found.parameters() - routed * (1 - share)


PUBLISHED: dict[str, tuple[str, dict[str, Any], int, float]] = {
    # name: (model_type, values that differ from the class's defaults, parameters of the weight files, active)
    "Llama-3-8B": (
        "llama",
        {"vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8},
        8_030_261_248,
        8.0e9,
    ),
    "Mixtral-8x7B": ("mixtral", {}, 46_702_792_704, 12.9e9),
    "OLMoE-1B-7B": (
        "olmoe",
        {"vocab_size": 50_304, "intermediate_size": 1024, "num_hidden_layers": 16},
        6_919_161_856,
        1.3e9,
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"num_hidden_layers": 48, "head_dim": 128, "moe_intermediate_size": 768},
        30_532_122_624,
        3.3e9,
    ),
    "gpt-oss-120b": ("gpt_oss", {}, 116_829_156_672, 5.7e9),  # 5.13e9 without the embedding of 0.58e9
    "Hy3": ("hy_v3", PRESETS["hy3"], 295_033_528_320, 20.7e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name: str) -> None:
    model_type, changes, parameters, active = PUBLISHED[name]
    found = shape_of(name, CONFIG_MAPPING[model_type](**changes).to_dict())
    assert found.parameters() == parameters
    assert found.active == pytest.approx(active, rel=0.02)


def test_deepseek_v3_has_its_published_size_and_cache() -> None:
    # 671,026,419,200 values in the weight files, of which 58 x 256 are the routers' correction biases; 37e9 active.
    # The latent of 512 values and a rotary key of 64 in 61 layers: 70,272 bytes per token (arXiv 2505.09343, table 1).
    found = shape_of("deepseek-v3", CONFIG_MAPPING["deepseek_v3"]().to_dict())
    assert found.parameters() + 58 * 256 == 671_026_419_200
    assert found.active == pytest.approx(37.6e9, rel=0.01)
    assert found.cache_bytes(1) == 70_272


def test_the_preset_of_hy3_is_the_class_of_transformers() -> None:
    preset, default = (CONFIG_MAPPING["hy_v3"](**values).to_dict() for values in (PRESETS["hy3"], {}))
    assert preset == default


def test_a_grown_model_has_the_size_that_hot_start_gives_it(tmp_path: Path) -> None:
    dense = save_tiny("qwen3", tmp_path)
    recipe = load_recipe("quickstart", [f"model.source={tmp_path}/.", "model.top_k=2"])
    (job,) = jobs_of(recipe, None, "sft")
    grown = upcycle(dense, experts=4, top_k=2, expert_width=None, seed=0)
    assert job.members[0].parameters == sum(parameter.numel() for parameter in grown.parameters())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "qwen3_moe", "gpt_oss", "lfm2"])
def test_the_cache_is_what_is_allocated(model_type: str) -> None:
    model, tokens = tiny_model(model_type, attention="eager"), 5  # fewer than a window
    with torch.no_grad():
        cache = model(torch.randint(3, 500, (1, tokens)), use_cache=True).past_key_values
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    assert shape(model_type).cache_bytes(tokens, 4) == sum(t.nbytes for t in held if t is not None)


def test_a_window_bounds_the_cache_and_the_attention() -> None:
    # Two layers of the three have a window of 8; keys and values of 2 heads of 32, in two bytes.
    found = shape("gpt_oss", sliding_window=8)
    assert found.cache_bytes(100) == (100 + 2 * 8) * 2 * 2 * 32 * 2
    (windowed, _), (full, _) = sorted(found.kinds, key=lambda kind: kind[0].window is None)
    lengths = [min(token, 8) for token in range(100)]
    assert windowed.attended(100) == pytest.approx(sum(lengths) / 100, abs=0.1)
    assert full.attended(100) == 50


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3", "hy_v3", "gemma3_text"])
def test_flops_are_those_that_torch_counts(model_type: str) -> None:
    """Eager attention also computes masked scores."""
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = tiny_model(model_type, attention="eager"), 8
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(3, 500, (1, tokens)), use_cache=False)
    expected = tokens * shape(model_type).token_flops(tokens)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize(
    "model_type", ["llama", "phi3", "qwen2_moe", "ernie4_5_moe", "hy_v3", "deepseek_v3", "gpt_oss"]
)
@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=4, train_router=True),
        Lora(rank=2, experts=False, train_router=True),
        Lora(rank=2, shared_mlp=False),
        Lora.model_validate({"rank": 4, "targets": ["layers.1.*.o_proj"], "modules_to_save": ["model.norm"]}),
        Lora(rank=2, experts=False, dora=True),
    ],
)
def test_adapter_parameters_equal_pefts(model_type: str, lora: Lora) -> None:
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = family_of(config).policy(config)
    add_lora(model, lora, task="CAUSAL_LM")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    inside, outside = shape(model_type).adapters(lora)
    assert inside == sum(count for name, count in trained.items() if ".experts." in name)
    assert inside + outside == sum(trained.values())


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_trained_embeddings_of_a_scorer_are_those_of_the_input(model_type: str) -> None:
    config, lora = tiny_config(model_type, num_labels=1), Lora(rank=2, train_embeddings=True)
    with torch.device("meta"):
        model = family_of(config).scorer(config)
    add_lora(model, lora, task="SEQ_CLS")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(shape(model_type).adapters(lora, scorer=True)) + config.hidden_size == trained


# --- activations -----------------------------------------------------------------------------------------------


def saved_bytes(
    model_type: str, layers: int, dtype: torch.dtype, *, rows: str = "packed", lora: Lora | None = None, **changes: Any
) -> int:
    """Bytes that autograd saves in one forward pass of the policy on a CPU, without weights."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **depth(model_type, layers) | changes)
    model = family_of(config).policy(config).to(dtype).train()
    if lora is not None:
        add_lora(model, lora, task="CAUSAL_LM", in_float32=False)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    length = LENGTHS.get(rows, LENGTH)
    ids = torch.randint(3, 500, (ROWS, length))
    packing = Packing([length] * ROWS, shared=[0, 1] * (ROWS // 2) if rows == "pairs" else None)
    inputs: dict[str, Any] = {"input_ids": ids.flatten()[None, : packing.total], "packing": packing}
    if rows == "padded":
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(**inputs, use_cache=False, output_router_logits=True)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)


@pytest.mark.parametrize(
    ("model_type", "error"),
    [("llama", 0.02), ("qwen3_moe", 0.02), ("deepseek_v3", 0.02), ("gemma2", 0.02), ("gpt_oss", 0.05)],
)
def test_activations_under_autocast_equal_those_that_autograd_saves(model_type: str, error: float) -> None:
    """Trained fp32 weights in a bf16 recipe without DeepSpeed. Autograd also saves bf16 copies of the matrices."""
    saved = []
    for layers in (4, 2):
        with torch.autocast("cpu", torch.bfloat16):
            saved.append(saved_bytes(model_type, layers, torch.float32))
    found = shape(model_type, **depth(model_type, 4))
    copies = sum(2 * (layer.parameters - layer.norms) for layer in found.layers[2:])
    run = Pass(ROWS * LENGTH, LENGTH, False, 2, 4, looped=True)
    planned = sum(layer_bytes(found, layer, run) for layer in found.layers[2:])
    assert planned + copies == pytest.approx(saved[0] - saved[1], rel=error)


ROWS, LENGTH = 4, 160  # longer than the sequences for which attention on a CPU has code of its own
LENGTHS = {"short": 48}


def depth(model_type: str, layers: int) -> dict[str, Any]:
    """Changes that give a tiny model `layers` layers, with those of the last kind added at the end."""
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    if model_type in ("gpt_oss", "gemma2"):
        changes["layer_types"] = ["full_attention"] * layers
    if model_type == "deepseek_v3":  # for other heads of values attention on a CPU has no kernel of its own
        changes["v_head_dim"] = 96
    return changes


@pytest.mark.parametrize("rows", ["packed", "padded", "pairs", "short"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, Lora(rank=4, experts=False, train_router=False)], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", SEAMS)
def test_activations_equal_those_that_autograd_saves(
    model_type: str, lora: Lora | None, dtype: torch.dtype, rows: str
) -> None:
    more, less = (saved_bytes(model_type, layers, dtype, rows=rows, lora=lora) for layers in (4, 2))
    found, length, size = shape(model_type, **depth(model_type, 4)), LENGTHS.get(rows, LENGTH), dtype.itemsize
    run = Pass(ROWS * length, length, rows == "padded", size, size, lora, size, True, rows == "pairs", on_cpu=True)
    planned = sum(layer_bytes(found, layer, run) for layer in found.layers[2:])
    assert planned == pytest.approx(more - less, rel=0.01)


@pytest.mark.parametrize(
    ("model_type", "changes"), [("deepseek_v3", {"v_head_dim": 32}), ("llama", {"attention_dropout": 0.1})]
)
def test_weights_that_a_cpu_stores_are_planned(model_type: str, changes: dict[str, Any]) -> None:
    """Torch has no kernel without stored weights for values of another size than keys, and for dropout."""
    more, less = (saved_bytes(model_type, layers, torch.float32, **changes) for layers in (4, 2))
    found = shape(model_type, **depth(model_type, 4) | changes)
    run = Pass(ROWS * LENGTH, LENGTH, False, 4, 4, looped=True, on_cpu=True)
    planned = sum(layer_bytes(found, layer, run) for layer in found.layers[2:])
    assert planned == pytest.approx(more - less, rel=0.01)
    on_gpu = sum(layer_bytes(found, layer, replace(run, on_cpu=False)) for layer in found.layers[2:])
    assert planned - on_gpu > ROWS * LENGTH**2 * found.heads * 4  # two layers store at least one matrix per head
