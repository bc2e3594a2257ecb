"""The loss head in bf16 against float64, for token probabilities from 0.01 to 0.9999, within bounds on the rounding.

u = 2^-8 is the unit roundoff of bf16. The head and the float64 reference multiply the same bf16 values, so their logits
differ only by fp32 rounding. The gradient of the logits, g, is rounded to bf16 once. The gradient of the hidden states
is rounded after the product with the weight and again after scaling by the incoming gradient. The gradient of the
weight is rounded once. An element of a gradient therefore has an error of at most u sum |g x| + 2 u |gradient|, plus
the fp32 error of g. x is the weight for the hidden states' gradient, and the hidden states for the weight's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.losses import linear_head
from align.losses.linear_head import linear_cross_entropy, linear_logits, linear_logprobs

PROBABILITIES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
# 1,500 is not a multiple of linear_head.BLOCK.
ROWS, HIDDEN, VOCABULARY = 8, 64, 1500
U, EPS = 2.0**-8, torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of five rows, so that eight rows make one full and one partial chunk."""
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 5 * VOCABULARY * 4)


def rows(probability: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [N, D], weight [V, D], tokens [N]), the first two in bf16. Each token has about this probability."""
    torch.manual_seed(1)
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.3).bfloat16()
    tokens = torch.randint(0, VOCABULARY, (ROWS,))
    base, towards = torch.randn(ROWS, HIDDEN) * 0.5, weight[tokens].float()
    low, high = torch.zeros(ROWS, 1), torch.full((ROWS, 1), 50.0)
    for _ in range(30):
        middle = (low + high) / 2
        logits = (base + middle * towards) @ weight.float().T / temperature
        under = logits.softmax(-1).gather(1, tokens[:, None]) < probability
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return (base + low * towards).bfloat16(), weight, tokens


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    excess = ((found.double() - expected).abs() / bound).max().item()
    assert excess <= 1, f"{excess:.2f} times the bound"


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("probability", PROBABILITIES)
def test_the_head_in_bf16_is_exact_up_to_the_rounding_of_its_operands(probability, temperature, autocast) -> None:
    hidden, weight, tokens = rows(probability, temperature)
    factors = torch.linspace(-2, 3, ROWS)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = exact_hidden @ exact_weight.T / temperature
    logits.retain_grad()
    every = logits.log_softmax(-1)
    exact = every.gather(1, tokens[:, None])[:, 0]
    (exact * factors).sum().backward()
    assert exact.exp().median().item() == pytest.approx(probability, rel=0.2)

    trained = (torch.float32 if autocast else torch.bfloat16,)
    ours, weight = (x.to(*trained).requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs, entropy, *_ = linear_logprobs(ours, weight, tokens, temperature)
    (logprobs * factors).sum().backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert ours.grad.dtype == weight.grad.dtype == trained[0]

    # A logit is an fp32 sum of HIDDEN exact products whose absolute values add up to at most `size`.
    size = (exact_hidden.abs() @ exact_weight.T.abs()).amax(1) / temperature
    logit_error = HIDDEN * EPS * size
    assert_within(logprobs, exact.detach(), 2 * logit_error + 16 * EPS)
    assert_within(entropy, -(every.exp() * every).sum(-1).detach(), 2 * logit_error * (2 + size) + 64 * EPS)
    g = logits.grad.abs() / temperature
    # 1 - p has the absolute error of p. The relative error of p is about the absolute error of the logit.
    g_error = U * g + 4 * (logit_error[:, None] + 4 * EPS) * torch.maximum(g, factors.abs()[:, None] / temperature)
    for found, expected, own in (
        (ours.grad, exact_hidden.grad, g_error @ exact_weight.detach().abs()),
        (weight.grad, exact_weight.grad, g_error.T @ exact_hidden.detach().abs()),
    ):
        assert_within(found, expected, own + 2 * U * expected.abs() + 1e-12)
    assert (ours.grad.double() - exact_hidden.grad).norm() < 0.06 * exact_hidden.grad.norm()


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_cross_entropy_in_bf16_has_the_gradient_of_the_log_probabilities(probability) -> None:
    hidden, weight, targets = rows(probability, 1.0)
    hidden.requires_grad_()
    (from_loss,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, count=1.0)[0], hidden)
    (from_logprobs,) = torch.autograd.grad(-linear_logprobs(hidden, weight, targets)[0].sum(), hidden)
    largest = from_logprobs.double().abs().amax(1, keepdim=True)
    assert ((from_loss.double() - from_logprobs).abs() <= 4 * U * largest).all()


def test_a_row_of_one_token_is_the_same_row_in_a_batch() -> None:
    hidden, weight, tokens = rows(0.99, 1.0)
    together, alone = (linear_logprobs(hidden[:n], weight, tokens[:n])[0] for n in (ROWS, 1))
    assert (together[:1] - alone).abs().max() <= 16 * EPS


@pytest.mark.parametrize("loss", ["logprobs", "cross_entropy"])
def test_the_weights_gradient_is_summed_over_chunks_without_rounding(monkeypatch, loss) -> None:
    """Hidden states and g are exact in bf16, but a chunk's sum over three rows is not.

    Adding up the chunks in bf16 would therefore change the result.
    """
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 3 * 64 * 4)
    count, vocabulary = 300, 64
    hidden = torch.full((count, 4), 1 + 2.0**-7).bfloat16()
    weight = torch.zeros(vocabulary, 4, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(count, dtype=torch.long)
    if loss == "logprobs":
        linear_logprobs(hidden, weight, tokens)[0].sum().backward()
    else:
        (-linear_cross_entropy(hidden, weight, tokens, count=1.0)[0]).backward()
    one_hot = torch.zeros(vocabulary, dtype=torch.float64).index_fill(0, torch.tensor(0), 1.0)
    exact = (count * (one_hot - 1 / vocabulary))[:, None] * hidden[0].double()
    assert torch.equal(weight.grad, exact.bfloat16())


def test_logits_of_bf16_are_fp32() -> None:
    hidden, weight, _ = rows(0.9, 1.0)
    logits = linear_logits(hidden, weight)
    assert logits.dtype == torch.float32
    exact = hidden.double() @ weight.double().T
    assert_within(logits, exact, HIDDEN * EPS * (hidden.double().abs() @ weight.double().T.abs()))


def test_the_bf16_head_of_the_model_samples_from_fp32_logits() -> None:
    from align.models.heads import TokenHead

    hidden, weight, tokens = rows(0.9, 1.0)
    head = TokenHead(HIDDEN, VOCABULARY, bias=False, dtype=torch.bfloat16)
    head.weight.data.copy_(weight)
    with torch.no_grad():
        logits = head(hidden[None])
    assert logits.shape == (1, ROWS, VOCABULARY)
    trained = linear_logprobs(hidden, weight, tokens)[0]
    sampled = logits[0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (sampled - trained).abs().max() < 1e-5
    assert head(hidden[None]).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU; there is no GPU")
def test_a_gpu_computes_the_same_head() -> None:
    hidden, weight, tokens = rows(0.99, 0.7)
    found = []
    for device in ("cpu", "cuda"):
        h, w = (x.to(device).requires_grad_() for x in (hidden, weight))
        logprobs, entropy, *_ = linear_logprobs(h, w, tokens.to(device), 0.7)
        logprobs.sum().backward()
        found.append([x.cpu().float() for x in (logprobs, entropy, h.grad, w.grad)])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=4 * U, atol=4 * U * cpu.abs().max().item() * 0.1)
