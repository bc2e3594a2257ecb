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
from align.eval.statistics.text import interval_text, percent_text, summary_text


def pair_lines(model: str, pairs: Sequence[ScoredPair]) -> list[str]:
    """Accuracy, by subset, and everything that qualifies it."""
    lines = [f"{model}: accuracy {summary_text(accuracy(pairs), 3)}"]
    subsets = by_subset(pairs)
    lines += [f"  {name}: {summary_text(found, 3)}" for name, found in subsets.items()]
    if len(subsets) > 1 and (mean := subset_mean(pairs)) is not None:
        lines.append(f"  mean of the {len(subsets)} subsets: {mean:.3f}")
    lines += [f"  {line}" for line in bias_lines("LENGTH BIAS", "longer completion", length_bias(pairs))]
    lines += [f"  {line}" for line in bias_lines("POSITION BIAS", "completion shown first", position_bias(pairs))]
    if (found := calibration(pairs)) is not None:
        lines.append(f"  calibration error {found.ece:.3f}, log loss {found.log_loss:.3f} (0.693 for equal scores)")
        for entry in found.bins:
            lines.append(
                f"    confidence {entry.low:.2f} to {entry.high:.2f}: mean {entry.confidence:.2f}, accuracy "
                f"{interval_text(entry.accuracy)} (n {entry.n})"
            )
    return lines


def bias_lines(name: str, kind: str, bias: Bias | None) -> list[str]:
    """A sentence about a bias, which begins with its name if it is shown."""
    if bias is None:
        return []
    often = f"the model prefers the {kind} in {percent_text(bias.model)} of {bias.n} pairs, the labels in "
    line = often + f"{percent_text(bias.labels)}; difference {percent_text(bias.extra)}"
    if bias.direction:
        line = f"{name}: {line}"
    sides = [(f"the {kind}", bias.right), ("the other one", bias.wrong)]
    known = [f"{interval_text(found)} where {side} is right" for side, found in sides if found is not None]
    return [line, f"  accuracy {', '.join(known)}"]


def agreement_lines(first: str, second: str, one: Sequence[ScoredPair], two: Sequence[ScoredPair]) -> list[str]:
    """Agreement of two models' preferences, and the difference of their accuracies."""
    found = model_agreement(one, two)
    if found is None:
        return [f"{first} and {second} have scored no pair in common"]
    kappa = "" if found.kappa is None else f", kappa {found.kappa:.2f}"
    return [
        f"{first} and {second} prefer the same completion in {percent_text(found.same)} of {found.n} pairs{kappa}",
        f"  accuracy of {first} minus {second}: {interval_text(found.difference)}, p {found.test.p_value:.3f} "
        f"({found.test.method})",
    ]


def best_of_n_lines(points: Sequence[BestOfN]) -> list[str]:
    """The curve, and the point after which more optimisation lowers the gold score."""
    lines = [
        f"n {point.n} (KL {point.kl:.2f}): proxy {interval_text(point.proxy)}, gold {interval_text(point.gold)}"
        for point in points
    ]
    if (best := over_optimised(points)) is not None:
        lines.append(f"OVER-OPTIMISATION: the gold score is highest at n {best.n} and lower at n {points[-1].n}")
    return lines
