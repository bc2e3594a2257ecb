"""Every loss on bf16 inputs against float64, for token probabilities from 0.01 to 0.9999.

The cases include long rows, rows of one token, and an expert without tokens.

A loss computes in fp32, whatever the type of its inputs. The error of a value is therefore fp32 rounding only: at most
ROUNDINGS * eps times the largest term. ROUNDINGS = 64 covers the elementary functions in a term and the summation. A
gradient is also rounded to the type of its input, with a relative error of at most u = 2^-8.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from align.losses.kl import kl_estimate, kl_loss
from align.losses.moe import balance_loss, expert_load, router_entropy, router_z_loss
from align.losses.ppo import cispo_loss, explained_variance, importance_weight, policy_loss, value_loss
from align.losses.preference import (
    PREFERENCE_LOSSES,
    bradley_terry_loss,
    kto_kl,
    kto_loss,
    preference_loss,
    sft_loss,
)
from align.losses.reduce import averaging_weights, masked_mean, whiten
from align.models.experts import mix_experts

U, EPS = 2.0**-8, torch.finfo(torch.float32).eps
ROUNDINGS = 64
PROBABILITIES = (0.01, 0.5, 0.9, 0.99, 0.9999)
SHAPES = {"rows": (4, 37), "long_rows": (2, 5001), "rows_of_one_token": (3, 1)}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(probability: float, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Per-token inputs in bf16. The policies' log-probabilities have a standard deviation of 10 % of log p.

    The last row has no valid token.
    """
    logp = float(torch.tensor(probability).log())
    mask = (numbers(0, *shape) > -1).float()
    mask[0], mask[-1] = 1.0, 0.0
    near = {name: logp * (1 + 0.1 * numbers(i, *shape)) for i, name in enumerate(("new", "old", "ref", "rollout"), 1)}
    others = {name: numbers(i, *shape) for i, name in enumerate(("advantages", "values", "old_values", "returns"), 5)}
    return {name: x.bfloat16() for name, x in (near | others | {"mask": mask}).items()}


def on_tokens(function: Callable[..., object], *names: str, **options: object) -> Callable[[dict[str, Tensor]], object]:
    return lambda x: function(*(x[name] for name in names), **options)


POLICY = ("new", "old", "advantages", "mask")
OF_TOKENS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "clip": on_tokens(policy_loss, *POLICY, clip_range=0.2, count=50.0),
    "dual clip": on_tokens(policy_loss, *POLICY, clip_range=0.2, dual_clip=1.05, count=50.0),
    "sequence ratio": on_tokens(policy_loss, *POLICY, clip_range=3e-4, sequence=True, count=50.0),
    "cispo": on_tokens(cispo_loss, *POLICY, clip_range=0.2, count=50.0),
    "importance": on_tokens(importance_weight, "old", "rollout", "mask", cap=2.0),
    "sequence importance": on_tokens(importance_weight, "old", "rollout", "mask", cap=2.0, sequence=True),
    "value": on_tokens(value_loss, "values", "old_values", "returns", "mask", clip_range=0.2, count=50.0),
    "explained variance": on_tokens(explained_variance, "values", "returns", "mask"),
    **{kind: on_tokens(kl_estimate, "new", "ref", estimator=kind) for kind in ("k1", "k2", "k3")},
    **{f"{kind} loss": on_tokens(kl_loss, "new", "ref", "mask", estimator=kind, count=50.0) for kind in ("k2", "k3")},
    "mean": on_tokens(masked_mean, "values", "mask"),
    "whitened": on_tokens(whiten, "values", "mask"),
    "mean over completions": on_tokens(
        lambda x, mask: masked_mean(
            x * averaging_weights(mask, "completions", count=50.0, completions=3.0, max_tokens=9), mask, 50.0
        ),
        "values",
        "mask",
    ),
    "sft": on_tokens(sft_loss, "new", "mask"),
}


def flat(result: object) -> list[Tensor]:
    """All tensors of a result, which is a tensor or (loss, metrics)."""
    if isinstance(result, Tensor):
        return [result]
    loss, metrics = result  # type: ignore[misc]
    return [loss, *metrics.values()]


def compare(function: Callable[[dict[str, Tensor]], object], inputs: dict[str, Tensor], size: float) -> None:
    """Compare values and gradients with float64. size: bound on the terms of their sums."""
    narrow = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in inputs.items()}
    exact = {k: x.double().requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    found, expected = flat(function(narrow)), flat(function(exact))
    tolerance = ROUNDINGS * EPS * size
    for a, b in zip(found, expected, strict=True):
        assert a.dtype != torch.bfloat16
        assert (a.double() - b).abs().max() <= tolerance, ((a.double() - b).abs().max().item(), tolerance)
    if not expected[0].requires_grad:
        return
    found[0].sum().backward()
    expected[0].sum().backward()
    for name, x in narrow.items():
        if exact[name].grad is None or name == "mask":
            continue
        gradient, truth = x.grad.double(), exact[name].grad
        assert ((gradient - truth).abs() <= U * truth.abs() + tolerance).all(), name


def longest_sum(x: Tensor) -> float:
    """Largest sum of absolute log-ratios in a row: a bound on the exponent of a sequence-level ratio."""
    return float(x.abs().sum(-1).amax())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_losses_over_tokens(name, probability, shape) -> None:
    inputs = tokens(probability, SHAPES[shape])
    # Bound on the terms of a mean, or of a sum over all tokens divided by 50. Values, advantages and log-ratios are
    # below 5, so a product of two is below 25. The largest ratio is below e^5 at p = 0.01, and near 1 otherwise.
    ratio = float((inputs["new"].double() - inputs["old"].double()).abs().amax().exp())
    size = max(1.0, inputs["mask"].numel() / 50) * 25 * ratio
    if name == "sequence importance":
        size = 2 * (1 + longest_sum(inputs["old"].double() - inputs["rollout"].double()))
    compare(OF_TOKENS[name], inputs, size)


def pairs(probability: float, length: int, count: int) -> dict[str, Tensor]:
    """Log-probabilities [count] and lengths of pairs: chosen completions have `length` tokens, rejected one more."""
    logp = float(torch.tensor(probability).log()) * length
    names = [f"{ref}{side}_logprobs_B" for ref in ("", "ref_") for side in ("chosen", "rejected")]
    sums = {name: (logp * (1 + 0.02 * numbers(i, count))).bfloat16() for i, name in enumerate(names)}
    lengths = {f"{side}_tokens_B": torch.full((count,), length + i) for i, side in enumerate(("chosen", "rejected"))}
    return sums | lengths


OPTIONS = {"beta": 0.1, "label_smoothing": 0.1, "discopop_tau": 0.05, "simpo_gamma": 0.5}


@pytest.mark.parametrize(("length", "count"), [(1, 1), (30, 7), (400, 300)], ids=["one_token", "pairs", "many"])
@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_losses_over_pairs(name, probability, length, count) -> None:
    inputs = pairs(probability, length, count)
    sides = [inputs[f"{side}_logprobs_B"].double() - inputs[f"ref_{side}_logprobs_B"].double()
             for side in ("chosen", "rejected")]  # fmt: skip
    margin = 0.1 * float((sides[0] - sides[1]).abs().amax())
    reward = float(torch.stack(sides).abs().amax()) + float(inputs["chosen_logprobs_B"].abs().amax())
    # Largest terms: IPO and SPPO square the distance of a log-ratio from 1 / (2 beta) = 5. DiscoPOP has exp(-margin).
    size = (5 + reward) ** 2 if name in ("ipo", "sppo_hard") else (1 + reward) * (2.72**margin if "pop" in name else 1)
    if name in ("aot", "aot_unpaired"):
        size *= 2
    compare(lambda x: preference_loss(name, x, OPTIONS), inputs, size)


@pytest.mark.parametrize("count", [1, 300])
def test_losses_over_scores_and_single_completions(count) -> None:
    chosen, rejected, margins = (x.bfloat16() for x in numbers(0, 3, count) * 4)
    compare(
        lambda x: bradley_terry_loss(x["chosen"], x["rejected"], margins_B=x["margins"], center_coef=0.01),
        {"chosen": chosen, "rejected": rejected, "margins": margins},
        40,
    )
    inputs = {"new": chosen, "ref": rejected, "desirable": numbers(1, count) > 0}
    compare(lambda x: kto_loss(x["new"], x["ref"], x["desirable"], kto_kl(x["ref"], x["new"]), beta=0.1), inputs, 40)


def test_every_loss_on_pairs_has_its_options_here() -> None:
    for name, function in PREFERENCE_LOSSES.items():
        options = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert options <= {*OPTIONS, "count"}, name


@pytest.mark.parametrize("count", [1, 5001])
@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("name", ["balance", "z", "entropy", "load"])
def test_router_losses_with_an_expert_without_tokens(name, probability, count) -> None:
    """Expert 0 has about this probability. The last of the four experts gets no token."""
    logits = torch.stack([torch.full((count,), float(torch.tensor(3 * probability / (1 - probability)).log()))] + 3 *
                         [torch.zeros(count)], dim=1)  # fmt: skip
    logits = logits + 0.1 * numbers(0, count, 4)
    mask = (numbers(1, count) > -1).float()
    mask[0] = 1.0
    experts = torch.arange(count)[:, None] % 3
    functions = {
        "balance": lambda x: balance_loss(x["logits"], experts, x["mask"]),
        "z": lambda x: router_z_loss(x["logits"], x["mask"]),
        "entropy": lambda x: router_entropy(x["logits"], x["mask"]),
        "load": lambda x: expert_load(experts, 4, x["mask"]),
    }
    inputs = {"logits": logits.bfloat16(), "mask": mask.bfloat16()}
    # In the entropy, |p log p| <= |log p|. The load of an expert without tokens is exactly zero.
    compare(functions[name], inputs, (1 + float(logits.abs().amax())) ** 2)
    assert expert_load(experts, 4, inputs["mask"])[3] == 0


def test_experts_in_bf16_with_an_expert_without_tokens() -> None:
    """The gate, up and down products are rounded to bf16 once each. Expert 2 gets no token, so its gradient is zero."""
    shapes = {"hidden": (9, 16), "gate_up": (4, 24, 16), "down": (4, 16, 12), "weights": (9, 1)}
    inputs = {name: (numbers(i, *shape) * 0.5).bfloat16() for i, (name, shape) in enumerate(shapes.items())}
    experts = torch.tensor([0, 1, 3, 3, 1, 0, 0, 3, 1])[:, None]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x = {name: tensor.detach().to(dtype, copy=True).requires_grad_() for name, tensor in inputs.items()}
        mix = partial(mix_experts, x["hidden"], experts, x["weights"], x["gate_up"], x["down"])
        output = mix(ACT2FN["silu"])
        output.sum().backward()
        results.append([output.detach(), *(x[name].grad for name in shapes)])
    for found, exact in zip(*results, strict=True):
        assert (found.double() - exact).norm() <= 3 * U * exact.norm()
    assert results[0][2][2].abs().max() == results[0][3][2].abs().max() == 0
