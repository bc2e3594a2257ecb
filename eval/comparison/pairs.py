"""A model of `align eval --pairs` in a comparison: values per pair, and figures that are not means over pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from align.eval.reward_model.pairs import Bias, ScoredPair, calibration, length_bias, position_bias, subset_mean
from align.eval.statistics.intervals import Interval

TASK = "preference pairs"
"""Task of the metrics of pairs. A task of `align eval` cannot have this name, because it has a space."""


class Kind(NamedTuple):
    """A kind of completion that a model may prefer.

    words, other: for the completion of this kind, and for the other one of its pair. chosen_is: True if the chosen
    completion is of this kind, False if the rejected one is, None if both or neither are.
    """

    key: str
    words: str
    other: str
    chosen_is: Callable[[ScoredPair], bool | None]
    bias: Callable[[Sequence[ScoredPair]], Bias | None]


KINDS = (
    Kind("longer", "the longer completion", "the shorter completion", attrgetter("chosen_longer"), length_bias),
    Kind(
        "first", "the completion shown first", "the completion shown second", attrgetter("chosen_first"), position_bias
    ),
)


class PairMetric(NamedTuple):
    """A metric with a value per pair. better: 1 if higher is better, -1 if lower is, 0 if neither."""

    key: str
    label: str
    better: int
    values: dict[str, float | None]


class Figure(NamedTuple):
    """A number of a model with its 95 % interval. low, high: None if there is no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


def prompts_of(pairs: Mapping[str, ScoredPair]) -> dict[str, str]:
    """The prompt of each pair. The pairs of one prompt are one cluster."""
    return {name: name if pair.prompt is None else str(pair.prompt) for name, pair in pairs.items()}


def pair_metrics(pairs: Mapping[str, ScoredPair]) -> Iterator[PairMetric]:
    """Accuracy on all pairs and by subset, loss, and how often the model prefers each of `KINDS`.

    The preference for a kind has no value for a pair without such a completion, or without a preference of the model.
    On the same pairs, two models differ in it by the difference of their biases, because the labels are the same.
    """
    if not pairs:
        return
    yield PairMetric("accuracy", "Accuracy on pairs", 1, {name: pair.right for name, pair in pairs.items()})
    for subset in dict.fromkeys(pair.subset for pair in pairs.values() if pair.subset):
        values = {name: pair.right for name, pair in pairs.items() if pair.subset == subset}
        yield PairMetric(f"accuracy/{subset}", f"Accuracy on pairs: {subset}", 1, values)
    yield PairMetric("log_loss", "Log loss on pairs", -1, {name: pair.log_loss for name, pair in pairs.items()})
    for kind in KINDS:
        found = {name: pair.prefers(kind.chosen_is(pair)) for name, pair in pairs.items()}
        known: dict[str, float | None] = {name: value for name, value in found.items() if value is not None}
        if known:
            yield PairMetric(f"prefers_{kind.key}", f"Prefers {kind.words}", 0, known)


def pair_figures(pairs: Mapping[str, ScoredPair]) -> dict[str, Figure]:
    """Mean of the subsets, biases and calibration error of a model, by their labels."""
    every = list(pairs.values())
    found: dict[str, Figure] = {}
    if len({pair.subset for pair in every if pair.subset}) > 1 and (mean := subset_mean(every)) is not None:
        found["Mean of the subsets' accuracies"] = Figure(mean)
    for kind in KINDS:
        if (bias := kind.bias(every)) is not None:
            found[f"Prefers {kind.words}: model minus labels"] = _figure(bias.extra)
            for side, interval in ((kind.words, bias.right), (kind.other, bias.wrong)):
                if interval is not None:
                    found[f"Accuracy where {side} is right"] = _figure(interval)
    if (reliability := calibration(every)) is not None:
        found["Calibration error"] = Figure(reliability.ece)
    return found


def _figure(interval: Interval) -> Figure:
    if math.isnan(interval.low):
        return Figure(interval.mean)
    return Figure(interval.mean, interval.low, interval.high)
