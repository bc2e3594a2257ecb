"""The chunked head against a softmax of all logits: values, gradients, temperature, ignored targets."""

from __future__ import annotations

import pytest
import torch

from align.losses import linear_head
from align.losses.linear_head import linear_cross_entropy, linear_logprobs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of seven tokens, so that 23 tokens make four chunks; the last has two tokens."""
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 7 * 50 * 4)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    return hidden, weight, torch.randint(0, 50, (23,))


EPS = torch.finfo(torch.float32).eps


def assert_close_in_float32(found, expected, operands=None) -> None:
    """Compare with a relative tolerance of 32 eps, and an absolute one of 32 eps times the largest operand.

    operands: by default the expected values.
    """
    largest = (expected if operands is None else operands).abs().max().item()
    torch.testing.assert_close(found, expected, rtol=32 * EPS, atol=32 * EPS * largest)


def gradients(value, *tensors):
    return torch.autograd.grad(value, tensors)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("count", [None, 40.0])
def test_cross_entropy_and_its_gradients(inputs, count, temperature) -> None:
    hidden, weight, tokens = inputs
    ours, scores = linear_cross_entropy(hidden, weight, tokens, count, temperature)
    logits = (hidden @ weight.T).double() / temperature
    plain = torch.nn.functional.cross_entropy(logits, tokens, reduction="sum") / (count or 23)
    torch.testing.assert_close(ours.double(), plain, rtol=8 * EPS, atol=0)
    for a, b in zip(gradients(ours * 3, hidden, weight), gradients(plain * 3, hidden, weight), strict=True):
        assert_close_in_float32(a, b)
    for own, other in zip(scores[:3], linear_logprobs(hidden, weight, tokens, temperature)[:3], strict=True):
        assert torch.equal(own, other)
        assert not own.requires_grad


def test_no_tokens_give_a_zero_loss_with_a_zero_gradient(inputs) -> None:
    hidden, weight, tokens = inputs
    loss, _ = linear_cross_entropy(hidden[:0], weight, tokens[:0])
    assert loss.item() == 0
    assert all(g.abs().sum() == 0 for g in gradients(loss, hidden, weight))


def test_the_most_probable_token_is_recognised(inputs) -> None:
    hidden, weight, tokens = inputs
    best = (hidden @ weight.T).argmax(-1)
    tokens = torch.where(torch.arange(23) % 2 == 0, best, tokens)
    found = linear_logprobs(hidden, weight, tokens).top1_N
    assert found.tolist() == (tokens == best).tolist()
    assert 0 < found.sum() < 23


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_gradients(inputs, temperature) -> None:
    hidden, weight, tokens = inputs
    logprobs, entropy, *_ = linear_logprobs(hidden, weight, tokens, temperature)
    every = ((hidden @ weight.T).double() / temperature).log_softmax(-1)
    plain = every.gather(1, tokens[:, None])[:, 0]
    assert_close_in_float32(logprobs.double(), plain, every)
    assert_close_in_float32(entropy.double(), -(every.exp() * every).sum(-1), every)
    assert not entropy.requires_grad
    # A nonlinear function of the log-probabilities, like PPO's loss.
    weights = torch.randn(23)
    ours, theirs = (weights * logprobs.exp()).sum(), (weights * plain.exp()).sum()
    for a, b in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        assert_close_in_float32(a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(inputs, frozen) -> None:
    hidden, weight, tokens = inputs
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    trained = weight if frozen == "hidden" else hidden
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, tokens[:, None]).sum()
    ours = linear_logprobs(hidden, weight, tokens)[0].sum()
    assert_close_in_float32(gradients(ours, trained)[0], gradients(plain, trained)[0])
    loss, _ = linear_cross_entropy(hidden, weight, tokens)
    assert_close_in_float32(gradients(loss, trained)[0], -gradients(mean_logprob(hidden, weight, tokens), trained)[0])


def mean_logprob(hidden, weight, tokens):
    return (hidden @ weight.T).log_softmax(-1).gather(1, tokens[:, None]).mean()


def test_bfloat16_agrees_with_float32_within_its_precision(inputs) -> None:
    hidden, weight, tokens = (t.detach() for t in inputs)
    exact = linear_logprobs(hidden, weight, tokens)[0]
    rounded = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), tokens)[0]
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.2


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    logprobs, entropy, *_ = linear_logprobs(hidden, weight, torch.tensor([0, 0]))
    assert logprobs[0].item() == 0
    assert logprobs[1].item() == pytest.approx(-2e4)
    assert torch.isfinite(entropy).all()
    assert all(torch.isfinite(g).all() for g in gradients(logprobs.sum(), hidden, weight))


def test_no_tokens_at_all() -> None:
    logprobs, entropy, *_ = linear_logprobs(torch.zeros(0, 4), torch.randn(9, 4), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
