"""Invariants of the model on random weights: caches, padding, shared keys and values, Auto classes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, StaticCache

import align.models  # noqa: F401
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM, HunYuanForSequenceClassification
from align.models.hunyuan.moe import route
from align.models.hunyuan.rope import rotation_tables
from align.plan.shape import shape_of
from tests.near import assert_near

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "max_position_embeddings": 64,
}
VARIANTS = [
    {},
    {"moe_topk": 2},
    {"use_cla": False},
    {"cla_share_factor": 4},
    {"use_qk_norm": False},
    {"num_experts": 1},
    {"num_experts": [1, 4, 2, 4], "moe_topk": [1, 2, 1, 1]},
    {"tie_word_embeddings": False, "num_shared_expert": 2},
    {"use_mixed_mlp_moe": False},
    {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
]


def build(**changes) -> HunYuanForCausalLM:
    torch.manual_seed(0)
    model = HunYuanForCausalLM(HunYuanConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norm weights other than 1, router scores without ties
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_decoding_equals_the_full_forward(changes, attention) -> None:
    model = build(**changes)
    model.set_attn_implementation(attention)
    ids = torch.randint(0, 97, (2, 10))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = DynamicCache()
        steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(10)]
    assert_near(torch.cat(steps, 1), full)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_cache_has_one_key_and_value_per_group(factor) -> None:
    model = build(cla_share_factor=factor)
    cache = DynamicCache()
    model(torch.randint(0, 97, (3, 7)), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
    assert held == 3 * shape_of("", model.config.to_dict()).cache_bytes(7, bytes_per_value=4)


def test_hunyuan_large_needs_a_twentieth_of_the_cache_of_multi_head_attention() -> None:
    published = shape_of("", {}).cache_bytes(1)
    every_head = shape_of("", {"use_cla": False, "num_key_value_heads": 80}).cache_bytes(1)
    assert (published, every_head) == (81_920, 1_638_400)


def test_static_cache_and_beam_search() -> None:
    model = build()
    ids = torch.randint(3, 97, (2, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dynamic = model.generate(ids, **settings)
    static = model.generate(ids, past_key_values=StaticCache(model.config, max_cache_len=16), **settings)
    assert torch.equal(dynamic, static)
    with_cache, without = (model.generate(ids, num_beams=3, use_cache=cached, **settings) for cached in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side) -> None:
    model = build()
    ids = torch.randint(3, 97, (1, 6))
    padding = torch.zeros(1, 3, dtype=torch.long)
    order = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat(order, 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    assert_near(out, model(ids).logits[0])


def test_padding_does_not_count_in_the_balance_loss() -> None:
    model = build()
    ids = torch.randint(3, 97, (1, 6))
    padded = torch.cat((ids, torch.zeros(1, 5, dtype=torch.long)), 1)
    mask = torch.cat((torch.ones(1, 6), torch.zeros(1, 5)), 1).long()
    alone = model(ids, output_router_logits=True)
    together = model(padded, attention_mask=mask, output_router_logits=True)
    assert_near(alone.aux_loss, together.aux_loss)
    for a, b in zip(alone.router.load, together.router.load, strict=True):
        assert_near(a, b)


def test_the_balance_loss_reaches_the_router() -> None:
    model = build()
    model(torch.randint(3, 97, (2, 8)), output_router_logits=True).aux_loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_top_one_is_not_renormalised_and_top_two_is() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    probabilities = logits.softmax(-1)[0]
    assert route(logits, 1).weights_Tk.item() == pytest.approx(probabilities[0].item())
    first, second = route(logits, 2).weights_Tk[0].tolist()
    assert first == pytest.approx((probabilities[0] / (probabilities[0] + probabilities[1])).item())
    assert first + second == pytest.approx(1.0)


def test_experts_equal_a_sum_over_one_token_at_a_time() -> None:
    block = build(moe_topk=2).model.layers[0].mlp
    hidden = torch.randn(1, 5, 32)
    output, routing = block(hidden)
    for t, token in enumerate(hidden[0]):
        expected = block.shared_mlp(token)
        for expert, weight in zip(routing.experts_Tk[t], routing.weights_Tk[t]):
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            expected = expected + weight * (block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        assert_near(output[0, t], expected)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_is_exact(training: bool) -> None:
    model = build().train(training)
    ids = torch.randint(3, 97, (2, 8))
    gradients, passes = [], []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, output_router_logits=True).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert len(passes) == 1 + 2


def test_gradient_checkpointing_leaves_a_cache_alone() -> None:
    model = build().eval()
    ids = torch.randint(3, 97, (2, 8))
    whole = model(ids).logits
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    continued = model(ids[:, 5:], past_key_values=cache).logits
    assert_near(continued, whole[:, 5:])
    continued.sum().backward()
    assert cache.get_seq_length() == 8


def test_checkpointing_alone_switches_the_cache_off() -> None:
    model = build()
    ids = torch.randint(3, 97, (1, 4))
    assert model(ids).past_key_values.get_seq_length() == 4
    model.gradient_checkpointing_enable()
    assert model(ids).past_key_values is None
    with torch.no_grad():
        assert model(ids).past_key_values.get_seq_length() == 4


def test_logits_of_some_positions() -> None:
    model, ids = build(), torch.randint(3, 97, (2, 7))
    logits = model(ids).logits
    assert_near(model(ids, logits_to_keep=2).logits, logits[:, 5:])
    assert_near(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


def test_hidden_states_begin_with_the_embedding_and_end_with_the_norm() -> None:
    model, ids = build(), torch.randint(3, 97, (1, 5))
    output = model.model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    layer = model.model.layers[0]
    attended, _ = layer.self_attn(
        layer.input_layernorm(output.hidden_states[0]),
        rotation_tables(model.model.inv_freq, torch.arange(5)[None], torch.float32),
        torch.full((5, 5), -torch.inf).triu(1)[None, None],
        None,
        None,
    )
    middle = output.hidden_states[0] + attended
    assert_near(output.hidden_states[1], middle + layer.mlp(layer.post_attention_layernorm(middle))[0])


def test_the_training_loss_adds_the_router_losses() -> None:
    model = build(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    ids = torch.randint(3, 97, (2, 8))
    plain, output = model(ids, labels=ids), model(ids, labels=ids, output_router_logits=True)
    added = 0.5 * output.router.balance_loss + 0.25 * output.router.z_loss
    assert added > 0.4
    assert_near(output.loss, plain.loss + added)
    expected = torch.nn.functional.cross_entropy(plain.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_near(plain.loss, expected)


def test_weights_start_with_the_configured_deviation() -> None:
    torch.manual_seed(0)
    model = HunYuanForCausalLM(HunYuanConfig(**{**SIZES, "hidden_size": 128}, initializer_range=0.3))
    mlp = model.model.layers[0].mlp
    matrices = (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.shared_mlp.up_proj.weight)
    for weight in (*matrices, model.model.embed_tokens.weight):
        assert weight.std().item() == pytest.approx(0.3, rel=0.15)
        assert abs(weight.mean().item()) < 0.05
    assert all((parameter == 1).all() for name, parameter in model.named_parameters() if "norm" in name)


def test_auto_classes_load_what_was_saved(tmp_path) -> None:
    model = build(num_shared_expert=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, HunYuanForCausalLM)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert isinstance(scorer, HunYuanForSequenceClassification)


def test_the_score_is_read_at_the_last_attended_token() -> None:
    torch.manual_seed(0)
    scorer = HunYuanForSequenceClassification(HunYuanConfig(**SIZES, num_labels=1)).eval()
    ids = torch.randint(3, 97, (1, 6))
    for padded, mask in (
        (torch.cat((ids, ids[:, :2]), 1), [1] * 6 + [0] * 2),  # the ids of padding do not matter
        (ids, [1] * 6),
    ):
        logits = scorer(padded, attention_mask=torch.tensor([mask])).logits
        assert_near(logits, scorer(ids).logits)


def test_unknown_keys_of_a_checkpoint_are_kept(tmp_path) -> None:
    HunYuanConfig(**SIZES).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"something_new": 3}))
    config = HunYuanConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["something_new"] == 3


def test_a_test_cannot_set_a_key_that_nothing_reads() -> None:
    with pytest.raises(TypeError, match="no key moe_capacity_factor"):
        HunYuanConfig(**SIZES, moe_capacity_factor=0.5)


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    ids = torch.randint(0, 97, (2, 12))
    plain = build()
    with torch.no_grad():
        wanted = plain(ids).logits
        for changes in ({"attention_dropout": 0.3}, {"hidden_dropout": 0.3}):
            for attention in ("eager", "sdpa"):
                model = build(**changes)
                model.set_attn_implementation(attention)
                assert_near(model.eval()(ids).logits, wanted)
                model.train()
                assert not torch.allclose(model(ids).logits, model(ids).logits), (changes, attention)
        # A layer's output is linear in its attention weights, so the mean over many dropout draws is the plain output.
        attention = build(attention_dropout=0.3, num_hidden_layers=2).model.layers[0].self_attn.train()
        attention.config._attn_implementation = "eager"
        hidden, rotation = torch.randn(1, 6, 32), (torch.ones(1, 1, 6, 8), torch.zeros(1, 1, 6, 8))
        draws = torch.stack([attention(hidden, rotation, None, None, None)[0] for _ in range(4000)])
        mean = attention.eval()(hidden, rotation, None, None, None)[0]
        error = draws.std(0) / 4000**0.5
        assert ((draws.mean(0) - mean).abs() < 5 * error + 1e-6).all()


def test_published_keys_are_read_as_they_are(tmp_path) -> None:
    config = {"moe_topk": [1, 1, 2, 1], "num_experts": [4] * 4, "eos_token_id": [95, 96], "pad_token_id": 94}
    rope = {"rope_scaling": {"type": "dynamic", "alpha": 100000.0, "factor": 1.0}}
    model = build(**config, **rope)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.moe_topk == [1, 1, 2, 1]
    assert loaded.config.eos_token_id == [95, 96]
    assert loaded.config.rope_base() == pytest.approx(10000.0 * 100000.0 ** (8 / 6))
    made = loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40, do_sample=False)
    stops = [i for i, token in enumerate(made[0, 3:].tolist()) if token in (95, 96)]
    assert made.shape[1] == (3 + stops[0] + 1 if stops else 43)
