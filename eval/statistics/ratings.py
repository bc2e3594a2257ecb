"""Bradley-Terry strengths of models from comparisons of two at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ELO = 400 / math.log(10)
"""Elo points per unit of strength."""


class Comparison(NamedTuple):
    """One comparison. result: 1 if `first` is better, 0 if `second` is, 0.5 for a tie. question: what was judged."""

    first: str
    second: str
    result: float
    question: object


class Rating(NamedTuple):
    """Strength of a model in Elo points, relative to the mean of all models, with its interval and its comparisons."""

    rating: float
    low: float
    high: float
    n: int


def bradley_terry(wins: NDArray[np.float64], *, prior: float = 0.1, tolerance: float = 1e-10) -> NDArray[np.float64]:
    """Log strengths, with mean 0, for which P(i beats j) = 1 / (1 + exp(s_j - s_i)) is most likely.

    wins: [models, models], how often i beat j; a tie counts half for both.
    prior: wins added to both sides of every pair, which keeps the strength of a model that always wins finite.
    The iteration is Hunter's (2004): strength = wins / sum over opponents of games / (sum of strengths).
    """
    wins = wins + prior
    np.fill_diagonal(wins, 0)
    games, total = wins + wins.T, wins.sum(axis=1)
    if (total == 0).any():
        raise ValueError("a model has not won once; set a prior above 0")
    strengths = np.ones(len(wins))
    for _ in range(10_000):
        new = total / (games / (strengths[:, None] + strengths[None, :])).sum(axis=1)
        new /= np.exp(np.log(new).mean())
        converged = np.abs(np.log(new / strengths)).max() < tolerance
        strengths = new
        if converged:
            break
    return np.log(strengths)


def rate(
    comparisons: Sequence[Comparison],
    *,
    prior: float = 0.1,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Rating]:
    """Rating of each model, best first, with percentile bootstrap intervals over questions.

    The question is the unit: all comparisons on it, such as both orders of a pair, are resampled together.
    """
    if not comparisons:
        raise ValueError("there are no comparisons to rate models by")
    names = sorted({name for c in comparisons for name in (c.first, c.second)})
    place = {name: number for number, name in enumerate(names)}
    questions = {question: number for number, question in enumerate(dict.fromkeys(c.question for c in comparisons))}
    by_question = np.zeros((len(questions), len(names), len(names)))
    counts = dict.fromkeys(names, 0)
    for c in comparisons:
        first, second, number = place[c.first], place[c.second], questions[c.question]
        by_question[number, first, second] += c.result
        by_question[number, second, first] += 1 - c.result
        counts[c.first] += 1
        counts[c.second] += 1
    ratings = ELO * bradley_terry(by_question.sum(axis=0), prior=prior)
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [
            ELO * bradley_terry(np.tensordot(weights, by_question, axes=1), prior=prior, tolerance=1e-6)
            for weights in generator.multinomial(
                len(questions), np.full(len(questions), 1 / len(questions)), size=resamples
            )
        ]
    )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    found = {name: Rating(float(ratings[i]), float(low[i]), float(high[i]), counts[name]) for name, i in place.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].rating))
