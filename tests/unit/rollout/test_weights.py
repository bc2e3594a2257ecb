"""`published_weights` yields every weight under its released name, exactly, and leaves the model as it was.

The Hugging Face engine samples from the weights of the last update.
"""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from align.config.lora import Lora
from align.config.rollout import Rollout
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.lora.adapters import add_lora
from align.models.lora.merge import merged_parameters
from align.models.weights import load_published, published_weights
from align.rollout.base import SamplingSettings, completion_seed
from align.rollout.hf_engine import HuggingFaceEngine


def tiny(**changes) -> HunYuanForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_experts": 4,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return HunYuanForCausalLM(HunYuanConfig(**(sizes | heads | {"initializer_range": 0.2} | changes))).eval()


def with_lora(model: HunYuanForCausalLM) -> torch.nn.Module:
    """Add adapters with non-zero weights to all layers, and change the router."""
    wrapped = add_lora(model, Lora(rank=4, alpha=8.0, train_router=True), task="CAUSAL_LM")
    with torch.no_grad():
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapped.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_plain_weights_equal_the_saved_checkpoint(tied, tmp_path):
    model = tiny(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    streamed = dict(published_weights(model))
    assert set(streamed) == set(saved)
    for name, tensor in streamed.items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize("top_k", [1, 2])
def test_adapters_are_merged_as_peft_merges_them(top_k):
    wrapped = with_lora(tiny(moe_topk=top_k))
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    streamed = {name: tensor.clone() for name, tensor in published_weights(wrapped)}
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter, before[name]), name
    expected = dict(published_weights(copy.deepcopy(wrapped).merge_and_unload()))
    base = dict(published_weights(tiny(moe_topk=top_k)))
    assert set(streamed) == set(expected)
    for name, tensor in streamed.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
        adapted = any(part in name for part in ("_proj", ".gate.wg."))
        assert torch.equal(tensor, base[name]) != adapted, name


def test_a_model_with_merged_weights_equals_one_with_adapters():
    wrapped = with_lora(tiny())
    plain = tiny()
    load_published(plain, published_weights(wrapped))
    ids = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, wrapped(ids).logits, rtol=1e-4, atol=1e-4)


def test_disabled_adapters_are_not_merged():
    wrapped = with_lora(tiny())
    with wrapped.disable_adapter():
        streamed = dict(merged_parameters(wrapped))
    for name, parameter in tiny().named_parameters():
        assert torch.equal(streamed[name], parameter), name


def test_missing_weights_are_refused():
    weights = [(n, t) for n, t in published_weights(tiny()) if ".experts.2.down_proj" not in n]
    with pytest.raises(ValueError, match=r"experts\.down_proj"):
        load_published(tiny(), iter(weights))


def test_seeds_are_distinct_and_fit():
    seeds = {completion_seed(s, p, n) for s in range(5) for p in range(50) for n in range(20)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_hugging_face_engine():
    model = tiny()
    engine = HuggingFaceEngine(copy.deepcopy(model), Rollout(max_model_length=64, max_sequences=3))
    prompts = [[3, 4, 5], [6], [7] * 20, [8, 9]]
    state = torch.get_rng_state()
    rows = engine.generate(prompts, SamplingSettings(12, temperature=0.7, seed=1, n=2, stop_token_ids=(11,)))
    assert torch.equal(torch.get_rng_state(), state)
    check(model, rows, prompts, 0.7)
    alone = engine.generate(prompts[:1], SamplingSettings(12, temperature=0.7, seed=1, n=2, stop_token_ids=(11,)))
    assert [c.token_ids for c in alone[0]] == [c.token_ids for c in rows[0]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    engine.update_weights(published_weights(model), 3)
    rows = engine.generate(prompts, SamplingSettings(12, temperature=0.0))
    check(model, rows, prompts, 1.0)
    assert {c.weight_version for row in rows for c in row} == {3}


@torch.no_grad()
def check(model, rows, prompts, temperature):
    for prompt, row in zip(prompts, rows, strict=True):
        for completion in row:
            assert completion.prompt_ids == prompt
            assert completion.finished == (completion.token_ids[-1] == 11 and temperature != 1.0)
            logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / temperature).log_softmax(-1)
            expected = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)
