"""Sentences about a reward model's results."""

from __future__ import annotations

from collections.abc import Sequence

from align.eval.reward_model.best_of_n import BestOfN, over_optimised
from align.eval.reward_model.pairs import (
    Bias,
    ScoredPair,
    accuracy,
    by_subset,
    calibration,
    length_bias,
    model_agreement,
    position_bias,
    subset_mean,
)
from align.eval.statistics.intervals import Interval
from align.eval.statistics.summary import Summary


def pair_lines(model: str, pairs: Sequence[ScoredPair]) -> list[str]:
    """Accuracy, by subset, and everything that qualifies it."""
    lines = [f"{model}: accuracy {_accuracy(accuracy(pairs))}"]
    subsets = by_subset(pairs)
    lines += [f"  {name}: {_accuracy(found)}" for name, found in subsets.items()]
    if len(subsets) > 1 and (mean := subset_mean(pairs)) is not None:
        lines.append(f"  mean of the {len(subsets)} subsets: {mean:.3f}")
    lines += [f"  {line}" for line in bias_lines("LENGTH BIAS", "longer completion", length_bias(pairs))]
    lines += [f"  {line}" for line in bias_lines("POSITION BIAS", "completion shown first", position_bias(pairs))]
    if (found := calibration(pairs)) is not None:
        lines.append(f"  calibration error {found.ece:.3f}, log loss {found.log_loss:.3f} (0.693 for equal scores)")
        for entry in found.bins:
            lines.append(
                f"    confidence {entry.low:.2f} to {entry.high:.2f}: mean {entry.confidence:.2f}, accuracy "
                f"{_interval(entry.accuracy)} (n {entry.n})"
            )
    return lines


def bias_lines(name: str, kind: str, bias: Bias | None) -> list[str]:
    """A sentence about a bias, which begins with its name if it is shown."""
    if bias is None:
        return []
    often = f"the model prefers the {kind} in {_percent(bias.model)} of {bias.n} pairs, the labels in "
    line = often + f"{_percent(bias.labels)}; difference {_percent(bias.extra)}"
    if bias.direction:
        line = f"{name}: {line}"
    sides = [(f"the {kind}", bias.right), ("the other one", bias.wrong)]
    known = [f"{_interval(found)} where {side} is right" for side, found in sides if found is not None]
    return [line, f"  accuracy {', '.join(known)}"]


def agreement_lines(first: str, second: str, one: Sequence[ScoredPair], two: Sequence[ScoredPair]) -> list[str]:
    """How often two models prefer the same completion, and which one is more accurate."""
    found = model_agreement(one, two)
    if found is None:
        return [f"{first} and {second} have scored no pair in common"]
    kappa = "" if found.kappa is None else f", kappa {found.kappa:.2f}"
    return [
        f"{first} and {second} prefer the same completion in {_percent(found.same)} of {found.n} pairs{kappa}",
        f"  accuracy of {first} minus {second}: {_interval(found.difference)}, p {found.test.p_value:.3f} "
        f"({found.test.method})",
    ]


def best_of_n_lines(points: Sequence[BestOfN]) -> list[str]:
    """The curve, and the point after which more optimisation lowers the gold score."""
    lines = [
        f"n {point.n} (KL {point.kl:.2f}): proxy {_interval(point.proxy)}, gold {_interval(point.gold)}"
        for point in points
    ]
    if (best := over_optimised(points)) is not None:
        lines.append(f"OVER-OPTIMISATION: the gold score is highest at n {best.n} and lower at n {points[-1].n}")
    return lines


def _accuracy(summary: Summary) -> str:
    if summary.mean is None:
        return f"unknown (n 0, {summary.unscored} unscored)"
    ends = "" if summary.low is None else f" [{summary.low:.3f}, {summary.high:.3f}]"
    return f"{summary.mean:.3f}{ends} (n {summary.n}, {summary.unscored} unscored)"


def _interval(found: Interval) -> str:
    ends = "" if found.low != found.low else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.mean:.2f}{ends}"


def _percent(found: Interval) -> str:
    ends = "" if found.low != found.low else f" [{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return f"{100 * found.mean:.0f}{ends} %"
