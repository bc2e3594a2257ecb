"""A reward model on preference pairs: accuracy, biases, calibration, agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from align.eval.statistics.intervals import Interval, difference_interval, mean_interval
from align.eval.statistics.significance import PairedTest, paired_test
from align.eval.statistics.summary import Summary, summarize


@dataclass(frozen=True)
class ScoredPair:
    """A pair with a model's scores.

    chosen, rejected: scores; None if one could not be computed.
    chosen_length, rejected_length: of the completions, in tokens or characters.
    subset: for results by subset; "" if there is none.
    chosen_first: True if the chosen completion was shown, or listed, first; None if the order is unknown.
    prompt: label of the prompt, if several pairs share one.
    """

    chosen: float | None
    rejected: float | None
    chosen_length: int
    rejected_length: int
    subset: str = ""
    chosen_first: bool | None = None
    prompt: object = None

    @property
    def margin(self) -> float | None:
        """Score of the chosen completion minus that of the rejected one; None if unknown or not finite."""
        if self.chosen is None or self.rejected is None:
            return None
        margin = self.chosen - self.rejected
        return margin if math.isfinite(margin) else None

    @property
    def right(self) -> float | None:
        """1 if the chosen completion has the higher score, 0.5 for equal scores, 0 otherwise; None if unknown."""
        margin = self.margin
        return None if margin is None else 0.5 if margin == 0 else float(margin > 0)

    @property
    def chosen_longer(self) -> bool | None:
        """True if the chosen completion is the longer one; None if both have the same length."""
        return None if self.chosen_length == self.rejected_length else self.chosen_length > self.rejected_length

    @property
    def log_loss(self) -> float | None:
        """-log sigmoid(margin), the loss of training; None if the margin is unknown."""
        margin = self.margin
        return None if margin is None else _softplus(-margin)

    def prefers(self, chosen_is_kind: bool | None) -> float | None:
        """1 if the model prefers the completion of a kind, such as the longer one, 0 if it prefers the other one.

        chosen_is_kind: True if the chosen completion is of this kind, False if the rejected one is, None if both or
        neither are. None if that is None, or the model has no preference.
        """
        margin = self.margin
        return None if chosen_is_kind is None or not margin else float((margin > 0) == chosen_is_kind)


class Bias(NamedTuple):
    """Tendency to prefer one kind of completion, such as the longer one.

    model, labels: how often the model and the labels prefer it. extra: their difference, with its interval.
    right, wrong: accuracy on the pairs whose label is of this kind, and on the others; None without such pairs.
    n: pairs in which exactly one completion is of this kind and the model has a preference.
    """

    model: Interval
    labels: Interval
    extra: Interval
    right: Interval | None
    wrong: Interval | None
    n: int

    @property
    def direction(self) -> int:
        """1 if the model prefers this kind more often than the labels do, -1 if less often, 0 if neither is shown."""
        return int(self.extra.low > 0) - int(self.extra.high < 0)


class Bin(NamedTuple):
    """Pairs whose confidence is between two ends. confidence: its mean. accuracy: share of right preferences."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: Interval


class Calibration(NamedTuple):
    """Calibration of the probabilities sigmoid(margin).

    bins: reliability table of the confidence max(p, 1 - p), from 0.5 to 1. Empty bins are absent.
    ece: expected calibration error, the mean distance of confidence and accuracy, weighted by the bins' pairs.
    log_loss: mean of -log sigmoid(margin), the loss of training.
    n: number of pairs.
    """

    bins: list[Bin]
    ece: float
    log_loss: float
    n: int


class ModelAgreement(NamedTuple):
    """Two models on the same pairs.

    same: share of pairs that both prefer alike. kappa: agreement beyond chance; None if chance alone gives it.
    difference: accuracy of the first minus that of the second. test: of this difference.
    n: pairs with a preference of both.
    """

    same: Interval
    kappa: float | None
    difference: Interval
    test: PairedTest
    n: int


def accuracy(pairs: Sequence[ScoredPair], subset: str | None = None) -> Summary:
    """Share of pairs in which the chosen completion has the higher score; equal scores count 0.5.

    A pair without a score is unscored. Pairs of one prompt are one cluster.
    """
    chosen = [pair for pair in pairs if subset in (None, pair.subset)]
    return summarize([pair.right for pair in chosen], resamples=2000, seed=0, clusters=_clusters(chosen))


def by_subset(pairs: Sequence[ScoredPair]) -> dict[str, Summary]:
    """Accuracy of each subset, in the order of their first pairs."""
    return {name: accuracy(pairs, name) for name in dict.fromkeys(pair.subset for pair in pairs if pair.subset)}


def subset_mean(pairs: Sequence[ScoredPair]) -> float | None:
    """Mean of the subsets' accuracies, so that a large subset has no more weight than a small one."""
    means = [summary.mean for summary in by_subset(pairs).values()]
    known = [mean for mean in means if mean is not None]
    return sum(known) / len(known) if known and len(known) == len(means) else None


def length_bias(pairs: Sequence[ScoredPair]) -> Bias | None:
    """Tendency to prefer the longer completion; None without pairs of different lengths."""
    return _bias(pairs, lambda pair: pair.chosen_longer)


def position_bias(pairs: Sequence[ScoredPair]) -> Bias | None:
    """Tendency to prefer the completion shown first; None without pairs whose order is known."""
    return _bias(pairs, lambda pair: pair.chosen_first)


def calibration(pairs: Sequence[ScoredPair], *, bins: int = 10) -> Calibration | None:
    """Reliability of sigmoid(margin), in bins of equal width; None without a pair."""
    margins = [margin for pair in pairs if (margin := pair.margin) is not None]
    if not margins:
        return None
    groups: dict[int, list[tuple[float, float]]] = {}
    for margin in margins:
        confidence = _sigmoid(abs(margin))
        number = min(int((confidence - 0.5) * 2 * bins), bins - 1)
        groups.setdefault(number, []).append((confidence, 0.5 if margin == 0 else float(margin > 0)))
    table, error = [], 0.0
    for number, found in sorted(groups.items()):
        confidence = sum(value for value, _ in found) / len(found)
        share = mean_interval([right for _, right in found])
        table.append(Bin(0.5 + number / bins / 2, 0.5 + (number + 1) / bins / 2, len(found), confidence, share))
        error += len(found) / len(margins) * abs(share.mean - confidence)
    loss = sum(_softplus(-margin) for margin in margins) / len(margins)
    return Calibration(table, error, loss, len(margins))


def model_agreement(first: Sequence[ScoredPair], second: Sequence[ScoredPair]) -> ModelAgreement | None:
    """Agreement of two models on the same pairs in the same order; None without a pair that both have scored."""
    both = [
        (pair, one > 0, two > 0)
        for pair, other in zip(first, second, strict=True)
        if (one := pair.margin or 0.0) != 0 and (two := other.margin or 0.0) != 0
    ]
    if not both:
        return None
    clusters = _clusters([pair for pair, _, _ in both])
    left, right = [float(one) for _, one, _ in both], [float(two) for _, _, two in both]
    same = mean_interval([float(a == b) for a, b in zip(left, right, strict=True)], clusters=clusters)
    share_left, share_right = sum(left) / len(left), sum(right) / len(right)
    chance = share_left * share_right + (1 - share_left) * (1 - share_right)
    kappa = None if chance == 1 else (same.mean - chance) / (1 - chance)
    difference = difference_interval(left, right, clusters=clusters)
    return ModelAgreement(same, kappa, difference, paired_test(left, right, clusters=clusters), len(both))


def _bias(pairs: Sequence[ScoredPair], is_chosen: Callable[[ScoredPair], bool | None]) -> Bias | None:
    """Tendency to prefer completions of a kind. is_chosen: True if the chosen completion is of this kind, False if the
    rejected one is, None if both or neither are."""
    found = [
        (pair, kind, margin > 0) for pair in pairs if (kind := is_chosen(pair)) is not None if (margin := pair.margin)
    ]
    if not found:
        return None
    clusters = _clusters([pair for pair, _, _ in found])
    model = [float(right == kind) for _, kind, right in found]
    labels = [float(kind) for _, kind, _ in found]

    def accuracy_if(wanted: bool) -> Interval | None:
        chosen = [(pair, float(right)) for pair, kind, right in found if kind is wanted]
        if not chosen:
            return None
        return mean_interval([right for _, right in chosen], clusters=_clusters([pair for pair, _ in chosen]))

    return Bias(
        mean_interval(model, clusters=clusters),
        mean_interval(labels, clusters=clusters),
        difference_interval(model, labels, clusters=clusters),
        accuracy_if(True),
        accuracy_if(False),
        len(found),
    )


def _clusters(pairs: Sequence[ScoredPair]) -> list[object] | None:
    """Label of each pair's prompt, or a label of its own; None if no prompt is known."""
    if all(pair.prompt is None for pair in pairs):
        return None
    return [("pair", number) if pair.prompt is None else pair.prompt for number, pair in enumerate(pairs)]


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-min(value, 700)))


def _softplus(value: float) -> float:
    return max(value, 0) + math.log1p(math.exp(-abs(value)))
