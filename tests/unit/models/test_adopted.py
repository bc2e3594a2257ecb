"""Adopted families equal transformers' own models: one family for each kind of seam.

`python -m tests.families` runs the same checks on all families.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.families import TABLE, Facts
from align.config.lora import Lora
from align.errors import UserError
from align.models.adopted.build import adopt
from align.models.adopted.routing import Replay, RoutingPass, read_routing
from align.models.adopted.vllm_fields import FIELDS, vllm_fields
from align.models.family import family, family_of, model_types, routed_layers
from align.models.packing import Packing
from align.models.routing import report_routing
from align.models.weights import check_weights
from align.train.checkpoint import load_policy
from tests.families import checks, planned
from tests.tiny_families import FAMILIES, save_tiny, tiny_config, tiny_model

SEAMS = {
    "llama": "grouped heads",
    "gemma2": "soft caps, tied",
    "gemma3_text": "sliding window, tied",
    "granite": "scaled logits",
    "lfm2_moe": "short convolutions, sigmoid router with a bias",
    "qwen3_moe": "softmax router, one published matrix per expert",
    "deepseek_v3": "MLA, router with groups and a bias, shared expert",
    "gpt_oss": "sinks, transposed experts with biases",
    "llama4_text": "routing weights on the inputs of experts, chunks",
}
DENSE = ["llama", "gemma2", "gemma3_text", "granite"]


@pytest.mark.parametrize("model_type", SEAMS)
def test_packed_log_probabilities_are_those_of_transformers(model_type: str) -> None:
    checks.check_forward(model_type)


@pytest.mark.parametrize("model_type", SEAMS)
def test_gradients_are_those_of_transformers(model_type: str) -> None:
    checks.check_gradients(model_type)


@pytest.mark.parametrize("model_type", SEAMS)
def test_bfloat16_is_as_exact_as_that_of_transformers(model_type: str, tmp_path: Path) -> None:
    checks.check_bfloat16(model_type, tmp_path)


@pytest.mark.parametrize("model_type", SEAMS)
def test_a_sequence_does_not_depend_on_its_neighbours(model_type: str) -> None:
    checks.check_packing(model_type)


@pytest.mark.parametrize("model_type", SEAMS)
def test_scores_of_a_reward_model_are_those_of_a_head_on_transformers_trunk(model_type: str) -> None:
    checks.check_scorer(model_type)


@pytest.mark.parametrize("model_type", sorted(set(SEAMS) - set(DENSE)))
def test_the_balance_loss_is_that_of_transformers_routers_without_padding(model_type: str) -> None:
    assert checks.check_balance(model_type) is not None


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "llama4_text"])
def test_the_peak_memory_is_planned(model_type: str) -> None:
    planned.check_plan(model_type)


@pytest.mark.parametrize("check", [checks.check_replay, checks.check_weighting, checks.check_balance])
def test_a_mixture_whose_routers_are_not_found_fails(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.models.adopted.model._router_class", lambda _: None)
    with pytest.raises(AssertionError, match="align finds no routers in this mixture of experts"):
        check("qwen3_moe")
    assert check("llama") is None


@pytest.mark.parametrize("model_type", sorted(set(SEAMS) - set(DENSE)))
def test_replay_uses_the_experts_it_is_told(model_type: str) -> None:
    checks.check_replay(model_type)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "lfm2_moe", "ernie4_5_moe"])
def test_the_router_report_has_the_scores_that_the_family_weighs_by(model_type: str) -> None:
    assert checks.check_weighting(model_type) is not None


@pytest.mark.parametrize("model_type", SEAMS)
def test_names_and_shapes_are_the_published_ones(model_type: str, tmp_path: Path) -> None:
    checks.check_names(model_type, tmp_path)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_moe", "gpt_oss"])
def test_a_saved_model_loads_in_plain_transformers(model_type: str, tmp_path: Path) -> None:
    checks.check_export(model_type, tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "llama4_text"])
def test_adapters_by_row_equal_merged_ones(model_type: str) -> None:
    checks.check_lora(model_type)


def test_several_experts_whose_inputs_are_weighed() -> None:
    """Llama 4's classes allow more than one expert per token; the weights are sigmoids of the chosen logits."""
    reference = tiny_model("llama4_text", num_experts_per_tok=2)
    model = checks.adopted("llama4_text", reference, num_experts_per_tok=2)
    ids = checks.rows()[2][None]
    routing = RoutingPass(None)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        model.model(input_ids=ids, routing=routing)
        torch.testing.assert_close(found, reference(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert set(routing.routings) == {0, 1, 2}
    for layer in routing.routings.values():
        expected = layer.logits_TE.topk(2)
        assert torch.equal(layer.chosen_Tk, expected.indices)
        torch.testing.assert_close(layer.weights_Tk, expected.values.sigmoid())


def test_every_adopted_family_has_a_tiny_model() -> None:
    assert set(model_types()) - set(FAMILIES) <= {"hunyuan", "toy"}


def test_a_family_whose_trunk_has_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "gpt_neox", Facts())
    kind: Any = adopt("gpt_neox")
    with pytest.raises(NotImplementedError, match="GPTNeoXForCausalLM cannot be adopted"), torch.device("meta"):
        kind.policy(kind.config(hidden_size=64, num_attention_heads=2, num_hidden_layers=1))


def test_the_router_report_of_a_sigmoid_router_is_that_of_its_scores() -> None:
    """Balance loss, load and entropy of one layer by hand: p = s / sum(s) with s = sigmoid(logits)."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0], [0.5, -0.5, 0.3, 0.1]])
    chosen = torch.tensor([[3, 1], [0, 2]])
    routing = read_routing((logits, torch.full((2, 2), 0.5), chosen), sigmoid=True)
    report = report_routing([routing], torch.ones(2))
    scores = logits.sigmoid()
    p = scores / scores.sum(1, keepdim=True)
    load = torch.tensor([1, 1, 1, 1]) / 4
    assert report.load[0].tolist() == load.tolist()
    assert float(report.balance_loss) == pytest.approx(float(4 * (load * p.mean(0)).sum()), abs=1e-6)
    assert float(report.entropy) == pytest.approx(float(-(p * p.log()).sum(1).mean()), abs=1e-6)


@pytest.mark.parametrize("first", ["logits", "indices"])
def test_a_routers_output_is_read_in_either_order(first: str) -> None:
    logits, weights, indices = torch.randn(3, 5), torch.rand(3, 2), torch.tensor([[0, 1], [4, 2], [3, 0]])
    output = (logits, weights, indices) if first == "logits" else (indices, weights, logits)
    routing = read_routing(output, sigmoid=False)
    assert torch.equal(routing.logits_TE, logits)
    assert torch.equal(routing.weights_Tk, weights)
    assert torch.equal(routing.chosen_Tk, indices)


def test_replayed_experts_outside_the_chosen_groups_keep_their_scores() -> None:
    """A router masks the scores of excluded groups before its top-k; a replayed expert there must not weigh zero."""
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    with Replay(torch.tensor([[0, 3]]), experts=4):
        masked = scores.masked_fill(torch.tensor([[True, True, False, False]]), 0.0)
        values, indices = masked.topk(2, dim=-1)
    assert indices.tolist() == [[0, 3]]
    assert values[0].tolist() == pytest.approx([0.1, 0.4])


def test_positions_minus_one_leave_the_choice_to_the_router() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    with Replay(torch.tensor([[0, -1]]), experts=4):
        values, indices = torch.topk(scores, 2, dim=-1)
    assert indices.tolist() == [[0, 2]]
    assert values[0].tolist() == pytest.approx([0.1, 0.3])


def test_activation_checkpointing_in_evaluation_mode_changes_no_gradient() -> None:
    """Replay must hold in the recomputation too, which happens after the forward pass has ended."""
    gradients = []
    for checkpointing in (False, True):
        model = checks.adopted("qwen3_moe", tiny_model("qwen3_moe"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sequences = checks.rows()
        with torch.no_grad():
            _, own = checks.packed_logprobs(model, sequences, output_router_logits=True)
        wanted = torch.where(own.routed_experts < 0, -1, (own.routed_experts + 1) % 8)
        logprobs, output = checks.packed_logprobs(model, sequences, routed_experts=wanted)
        (logprobs.sum() + output.router.balance_loss).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("model_type", FIELDS)
def test_saved_checkpoints_have_the_fields_that_vllm_reads(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type)
    for name in FIELDS[model_type](config):
        if getattr(config, name, None) is not None:
            delattr(config, name)
    expected = vllm_fields(config)
    assert expected
    known = family(model_type)
    with torch.device("meta"):
        known.policy(config).config.save_pretrained(tmp_path)
    assert expected.items() <= json.loads((tmp_path / "config.json").read_text()).items()
    loaded = known.config.from_pretrained(tmp_path)
    assert vllm_fields(loaded) == {}
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "hunyuan_v1_moe"])
def test_a_router_trained_in_float32_beside_a_model_in_bfloat16(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path)
    ids = torch.arange(3, 30)[None]
    policy = load_policy(tmp_path, "bfloat16", lora=Lora(rank=2, train_router=True))
    trained = [weight for name, weight in policy.named_parameters() if "modules_to_save" in name]
    assert trained
    assert all(weight.dtype == torch.float32 for weight in trained)
    found = policy(input_ids=ids).logits
    found.float().sum().backward()
    assert all(weight.grad is not None for weight in trained)
    expected = load_policy(tmp_path, "bfloat16")(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_padding_does_not_count_in_the_router_report() -> None:
    model = checks.adopted("qwen3_moe", tiny_model("qwen3_moe"))
    ids = checks.rows()[0]
    padded = torch.cat((ids, torch.zeros(4, dtype=torch.long)))[None]
    mask = torch.tensor([[1] * 5 + [0] * 4])
    with torch.no_grad():
        alone = model.model(input_ids=ids[None], output_router_logits=True).router
        with_padding = model.model(input_ids=padded, attention_mask=mask, output_router_logits=True).router
    assert float(with_padding.balance_loss) == pytest.approx(float(alone.balance_loss), abs=1e-6)
    assert float(with_padding.entropy) == pytest.approx(float(alone.entropy), abs=1e-6)


def test_a_packing_that_does_not_reach_attention_is_an_error() -> None:
    model = checks.adopted("llama", tiny_model("llama"))
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, forward=forward, packing=None, **k: forward(*a, **k)
    with pytest.raises(RuntimeError, match="does not pass a packing on"):
        checks.packed_logprobs(model, checks.rows())


def test_packing_refuses_a_mask() -> None:
    model = checks.adopted("llama", tiny_model("llama"))
    with pytest.raises(ValueError, match="neither a cache nor an attention mask"):
        model.model(input_ids=torch.ones(1, 3, dtype=torch.long), packing=Packing([3]), attention_mask=torch.ones(1, 3))


def test_layers_without_experts_are_dense() -> None:
    layers = routed_layers(tiny_config("deepseek_v3"))
    assert [tuple(layer) for layer in layers] == [(1, 1), (8, 2), (8, 2)]
    assert family_of(tiny_config("deepseek_v3")) is family("deepseek_v3")


def test_layers_for_multi_token_prediction_are_ignored(tmp_path: Path) -> None:
    """Several families are published with such layers, which transformers' classes do not load."""
    from safetensors.torch import load_file, save_file

    model = save_tiny("exaone_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "mtp.fc.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    check_weights(tmp_path, model.config)
    save_file({**tensors, "model.layers.3.extra.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=re.escape("has no tensor 'model.layers.3.extra.weight'")):
        check_weights(tmp_path, model.config)


def test_a_single_sequence_is_packed_as_several_are() -> None:
    """afmoe takes a view of what attention returns, which has no gaps between the heads for several sequences only."""
    reference = tiny_model("afmoe")
    model = checks.adopted("afmoe", reference)
    sequence = checks.rows()[1]
    with torch.no_grad():
        found, _ = checks.packed_logprobs(model, [sequence])
        expected = checks.token_logprobs(reference, sequence)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
