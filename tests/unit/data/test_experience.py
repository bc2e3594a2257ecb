"""Padding, micro-batches, and the positions at which log-probabilities, values and scores are read."""

from __future__ import annotations

import pytest
import torch

from align.config.lora import Lora
from align.data.experience import build_experience
from align.models.forward import critic_values, policy_output, sequence_scores
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM, HunYuanForSequenceClassification
from align.models.lora.adapters import add_lora

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
# Token 0 is both the pad and the EOS token: it must count where a completion contains it.
COMPLETIONS = [[20, 0], [21, 22, 23, 0], [24]]


UNEVEN = [[20, 0], [21, 22, 23, 0, 25, 26, 27, 28, 29], []]


@pytest.fixture
def batch():
    return experience(COMPLETIONS)


def experience(completions):
    return build_experience(PROMPTS, completions, [[0.0] * len(c) for c in completions])


def test_shapes_and_masks(batch) -> None:
    assert batch.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.lengths.tolist() == [5, 5, 5]
    cut = batch.rows(torch.tensor([0, 2]))
    assert cut.mask.shape == (2, 2)


def test_micro_batches_cover_every_row_once_and_respect_the_budget(batch) -> None:
    groups = list(batch.micro_batches(torch.arange(3), max_tokens=10))
    assert sorted(torch.cat(groups).tolist()) == [0, 1, 2]
    assert [len(group) for group in groups] == [2, 1]


def test_a_budget_smaller_than_a_row_gives_every_row_its_own_pass() -> None:
    batch = experience(UNEVEN)
    assert batch.lengths.tolist() == [5, 10, 4]
    assert [group.tolist() for group in batch.micro_batches(torch.arange(3), max_tokens=3)] == [[1], [0], [2]]
    assert [group.tolist() for group in batch.micro_batches(torch.arange(3), max_tokens=15)] == [[1, 0], [2]]
    assert list(batch.micro_batches(torch.arange(0), max_tokens=3)) == []


@pytest.mark.parametrize("completions", [COMPLETIONS, UNEVEN], ids=["even", "uneven"])
def test_logprobs_equal_those_of_each_sequence_alone(completions) -> None:
    torch.manual_seed(0)
    batch = experience(completions)
    model = HunYuanForCausalLM(HunYuanConfig(**SIZES)).eval()
    output = policy_output(model, batch, temperature=0.7)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, completions)):
        logits = model(torch.tensor([prompt + completion])).logits[0] / 0.7
        for t, token in enumerate(completion):
            expected = logits[len(prompt) - 1 + t].log_softmax(-1)
            assert output.logprobs[i, t].item() == pytest.approx(expected[token].item(), abs=1e-5)
            assert output.entropy[i, t].item() == pytest.approx(-(expected.exp() * expected).sum().item(), abs=1e-4)
    assert (output.logprobs[batch.mask == 0] == 0).all()


@pytest.mark.parametrize("completions", [COMPLETIONS, UNEVEN], ids=["even", "uneven"])
def test_values_and_scores_are_read_before_a_token_and_at_the_last_one(completions) -> None:
    torch.manual_seed(0)
    batch = experience(completions)
    model = HunYuanForSequenceClassification(HunYuanConfig(**SIZES, num_labels=1)).eval()
    values, scores = critic_values(model, batch), sequence_scores(model, batch)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, completions)):
        for t in range(len(completion)):
            alone = model(torch.tensor([prompt + completion[:t]])).logits.item()
            assert values[i, t].item() == pytest.approx(alone, abs=1e-5)
        assert scores[i].item() == pytest.approx(model(torch.tensor([prompt + completion])).logits.item(), abs=1e-5)


def test_adapters_and_replayed_routing_act_on_packed_sequences() -> None:
    """The expected values are those of the same model on each sequence alone, with the same replayed experts."""
    torch.manual_seed(0)
    batch = experience(UNEVEN)
    policy = add_lora(HunYuanForCausalLM(HunYuanConfig(**SIZES)), Lora(rank=4), task="CAUSAL_LM").eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        layers, width = SIZES["num_hidden_layers"], policy.get_base_model().config.moe_topk
        generator = torch.Generator().manual_seed(1)
        experts = torch.rand(*batch.input_ids.shape, layers, SIZES["num_experts"], generator=generator)
        batch.routed_experts = experts.argsort(-1)[..., :width].to(torch.int16)
        output = policy_output(policy, batch, 1.0, replay=True)
        free = policy_output(policy, batch, 1.0).logprobs
        for i, (prompt, completion) in enumerate(zip(PROMPTS, UNEVEN)):
            ids, length = torch.tensor([prompt + completion]), len(prompt + completion)
            routed = batch.routed_experts[i, None, :length]
            logprobs = policy(input_ids=ids, routed_experts=routed).logits[0].log_softmax(-1)
            for t, token in enumerate(completion):
                expected = logprobs[len(prompt) - 1 + t, token].item()
                assert output.logprobs[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert torch.equal(output.routed_experts[i, :length], routed[0])
            assert (output.routed_experts[i, length:] == -1).all()
        with policy.disable_adapter():
            without = policy_output(policy, batch, 1.0, replay=True).logprobs
    assert (output.logprobs - free).abs().max() > 1e-3
    assert (output.logprobs - without).abs().max() > 1e-3
