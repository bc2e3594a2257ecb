"""Padding, micro-batches and what is read at which position."""

from __future__ import annotations

import pytest
import torch

from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM, HunYuanForSequenceClassification
from align.rollout.experience import build_experience, critic_values, policy_output, sequence_scores

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
# Token 0 stands for pad and EOS at once: it must count where it is real.
COMPLETIONS = [[20, 0], [21, 22, 23, 0], [24]]


@pytest.fixture
def batch():
    return build_experience(PROMPTS, COMPLETIONS, [[0.0] * len(c) for c in COMPLETIONS])


def test_shapes_and_masks(batch) -> None:
    assert batch.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.lengths.tolist() == [5, 5, 5]
    cut = batch.rows(torch.tensor([0, 2]))
    assert cut.mask.shape == (2, 2)


def test_micro_batches_cover_every_row_once_and_keep_to_the_budget(batch) -> None:
    groups = list(batch.micro_batches(torch.arange(3), max_tokens=10))
    assert sorted(torch.cat(groups).tolist()) == [0, 1, 2]
    assert [len(group) for group in groups] == [2, 1]


def test_logprobs_equal_those_of_each_sequence_alone(batch) -> None:
    torch.manual_seed(0)
    model = HunYuanForCausalLM(HunYuanConfig(**SIZES)).eval()
    output = policy_output(model, batch, temperature=0.7)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        logits = model(torch.tensor([prompt + completion])).logits[0] / 0.7
        for t, token in enumerate(completion):
            expected = logits[len(prompt) - 1 + t].log_softmax(-1)
            assert output.logprobs[i, t].item() == pytest.approx(expected[token].item(), abs=1e-5)
            assert output.entropy[i, t].item() == pytest.approx(-(expected.exp() * expected).sum().item(), abs=1e-4)
    assert (output.logprobs[batch.mask == 0] == 0).all()


def test_values_and_scores_are_read_before_a_token_and_at_the_last_one(batch) -> None:
    torch.manual_seed(0)
    model = HunYuanForSequenceClassification(HunYuanConfig(**SIZES, num_labels=1)).eval()
    values, scores = critic_values(model, batch), sequence_scores(model, batch)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        for t in range(len(completion)):
            alone = model(torch.tensor([prompt + completion[:t]])).logits.item()
            assert values[i, t].item() == pytest.approx(alone, abs=1e-5)
        assert scores[i].item() == pytest.approx(model(torch.tensor([prompt + completion])).logits.item(), abs=1e-5)
