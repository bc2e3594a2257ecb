"""The mapping of published tensor names to our parameters and back, and to the vLLM model's parameters."""

from __future__ import annotations

import pytest
import torch

from align.models.family import Place
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.hunyuan.layout import VllmPlace, layer_of, place, published, published_shapes, vllm_pieces, vllm_place

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "top-1, tied": {"num_experts": 3},
    "untied, biases": {"num_experts": 2, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "dense and mixed layers": {"num_experts": [1, 3, 2, 1], "use_cla": False, "use_qk_norm": False},
    "no shared expert": {"num_experts": 4, "use_mixed_mlp_moe": False, "cla_share_factor": 4},
}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.3.mlp.experts.12.gate_proj.weight", Place("model.layers.3.mlp.experts.gate_up_proj", 12, 0)),
        ("model.layers.3.mlp.experts.12.up_proj.weight", Place("model.layers.3.mlp.experts.gate_up_proj", 12, 1)),
        ("model.layers.3.mlp.experts.0.down_proj.weight", Place("model.layers.3.mlp.experts.down_proj", 0)),
        ("model.layers.3.mlp.gate.wg.weight", Place("model.layers.3.mlp.gate.weight")),
        ("model.layers.3.mlp.gate_proj.weight", Place("model.layers.3.mlp.gate_proj.weight")),
        ("model.layers.3.mlp.shared_mlp.down_proj.weight", Place("model.layers.3.mlp.shared_mlp.down_proj.weight")),
        ("lm_head.weight", Place("lm_head.weight")),
    ],
)
def test_places(name: str, wanted: Place) -> None:
    assert place(name) == wanted


@pytest.mark.parametrize("case", CONFIGS)
def test_both_directions_are_inverse_and_cover_the_model(case: str) -> None:
    """Each published tensor equals the part of our parameter that its `Place` names; the parts cover all parameters."""
    torch.manual_seed(0)
    config = HunYuanConfig(**SIZES, **HEADS, **CONFIGS[case])
    parameters = dict(HunYuanForCausalLM(config).named_parameters())
    seen: dict[str, int] = {}
    shapes = {}
    for ours, parameter in parameters.items():
        for name, tensor in published(ours, parameter.detach()):
            found = place(name)
            assert found.parameter == ours
            assert torch.equal(found.within(parameter), tensor)
            seen[ours] = seen.get(ours, 0) + tensor.numel()
            shapes[name] = tuple(tensor.shape)
    assert seen == {name: parameter.numel() for name, parameter in parameters.items()}
    wanted = published_shapes(config)
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert shapes == wanted


def test_places_in_vllm() -> None:
    """Layers 0 and 2 compute keys and values. Layers 1 and 3 reuse them, so they have no merged q/k/v projection."""
    config = HunYuanConfig(**SIZES, **HEADS, num_experts=3)
    assert vllm_place("model.layers.2.self_attn.v_proj.weight", config) == VllmPlace(
        "model.layers.2.self_attn.qkv_proj.weight", "v_proj", shard="v"
    )
    assert vllm_place("model.layers.1.self_attn.q_proj.weight", config) == VllmPlace(
        "model.layers.1.self_attn.q_proj.weight"
    )
    assert vllm_place("model.layers.0.mlp.shared_mlp.up_proj.weight", config) == VllmPlace(
        "model.layers.0.mlp.shared_mlp.gate_up_proj.weight", "up_proj", shard=1
    )
    assert vllm_place("model.layers.0.mlp.experts.2.up_proj.weight", config) == VllmPlace(
        "model.layers.0.mlp.experts.w13", "up_proj", expert=2
    )
    assert vllm_place("model.layers.0.mlp.experts.2.down_proj.weight", config) == VllmPlace(
        "model.layers.0.mlp.experts.w2", "down_proj", expert=2
    )
    assert vllm_place("model.layers.0.mlp.gate.wg.weight", config).parameter == "model.layers.0.mlp.gate.wg.weight"


@pytest.mark.parametrize("case", CONFIGS)
def test_the_published_tensors_of_each_vllm_parameter_are_counted(case: str) -> None:
    """`vllm_pieces` equals the number of published tensors that `vllm_place` maps to the parameter."""
    config = HunYuanConfig(**SIZES, **HEADS, **CONFIGS[case])
    counts: dict[str, int] = {}
    for name in published_shapes(config):
        target = vllm_place(name, config).parameter
        counts[target] = counts.get(target, 0) + 1
    for name, count in counts.items():
        experts = config.experts_in(layer_of(name)) if ".experts." in name else -1
        assert vllm_pieces(name, experts) == count, name
    assert counts["model.layers.0.self_attn.qkv_proj.weight"] == 3
    assert counts["model.layers.0.self_attn.o_proj.weight"] == 1


def test_a_name_outside_the_layers_has_no_layer() -> None:
    assert layer_of("model.layers.13.mlp") == layer_of("model.layers.13") == 13
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is not part of a layer"):
        layer_of("model.norm.weight")
