"""Requests answered by transformers: batch and order do not matter, nucleus sampling, stop strings inside a token."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.rollout.hf_requests import HuggingFaceModel, sample
from align.rollout.requests import Pair, Request, decode_completion
from tests.unit.eval.local_tasks import SIZES, WORDS, make_tokenizer

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def policy() -> HunYuanForCausalLM:
    torch.manual_seed(0)
    return HunYuanForCausalLM(HunYuanConfig(vocab_size=len(TOKENIZER), **SIZES))


def ids(draw: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw.randrange(3, len(TOKENIZER)) for _ in range(draw.randint(low, high)))


def test_results_do_not_depend_on_batch_size_and_order(policy: HunYuanForCausalLM) -> None:
    draw = random.Random(5)
    requests = [
        Request(
            ids(draw, 1, 30),
            draw.randint(1, 12),
            temperature=draw.choice([0.0, 0.8, 1.0]),
            top_p=draw.choice([1.0, 0.9]),
            stop=draw.choice([(), ("e",), (" the", "\n")]),
            stop_token_ids=(2,),
            seed=i,
        )
        for i in range(14)
    ]
    pairs = [Pair(ids(draw, 1, 20), ids(draw, 1, 6)) for _ in range(10)]
    pairs += [Pair(pairs[0].prefix_ids, (token,)) for token in (5, 9)]
    answers, scores = [], []
    for batch_size, seed in ((1, 0), (3, 1), (64, 2)):
        model = HuggingFaceModel(policy, TOKENIZER, max_length=64, batch_size=batch_size)
        order = random.Random(seed).sample(range(len(requests)), len(requests))
        made = dict(model.generate([requests[i] for i in order]))
        answers.append({i: made[place] for place, i in enumerate(order)})
        order = random.Random(seed).sample(range(len(pairs)), len(pairs))
        found = dict(model.score([pairs[i] for i in order]))
        scores.append({i: found[place] for place, i in enumerate(order)})
    assert len(answers[0]) == len(requests)
    assert answers[0] == answers[1] == answers[2]
    for other in scores[1:]:
        for i, scored in scores[0].items():
            assert other[i].logprobs == pytest.approx(scored.logprobs, abs=1e-5)
            assert other[i].greedy == scored.greedy


def test_nucleus_sampling_keeps_the_likeliest_tokens_only() -> None:
    """Probabilities .5, .3, .15, .05: the smallest set with 0.7 is the first two; their shares are 5/8 and 3/8."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(top_p: float, temperature: float = 1.0) -> dict[int, float]:
        request = Request((1,), 1, temperature=temperature, top_p=top_p)
        drawn = Counter(int(sample(logits, request, generator)) for _ in range(4000))
        return {token: count / 4000 for token, count in drawn.items()}

    assert shares(0.7) == {1: pytest.approx(5 / 8, abs=0.03), 3: pytest.approx(3 / 8, abs=0.03)}
    assert set(shares(0.81)) == {1, 3, 0}
    assert set(shares(0.4)) == {1}
    assert shares(1.0)[1] == pytest.approx(0.5, abs=0.03)
    # At temperature 0.5 the probabilities are proportional to their squares.
    assert shares(1.0, 0.5)[1] == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)


def test_the_text_is_cut_before_the_first_stop_string() -> None:
    tokens = tuple(TOKENIZER(" ".join(WORDS)).input_ids)
    request = Request((1,), 99, stop=("ran", " mat"), stop_token_ids=(2,))
    assert decode_completion(TOKENIZER, tokens, request) == "the cat sat on a"
    assert decode_completion(TOKENIZER, (*tokens[:3], 2), Request((1,), 9, stop_token_ids=(2,))) == TOKENIZER.decode(
        tokens[:3]
    )
    assert decode_completion(TOKENIZER, (2,), request) == ""
