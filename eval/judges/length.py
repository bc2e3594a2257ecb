"""Win rate at equal length: the predicted win rate if both answers to each question had the same length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from align.eval.statistics.intervals import Interval

PENALTY = 0.01
"""Quadratic penalty on the length's coefficient, which keeps it finite if length decides every pair."""


def equal_length_rate(results: Sequence[float], lengths: Sequence[tuple[int, int]]) -> Interval | None:
    """Win rate of the first model at equal length, with its interval; None if all results are equal.

    Logistic regression of the results on tanh(difference of lengths / its standard deviation); the rate is the model's
    value at 0. Interval: on the logit scale, from the larger of the robust (sandwich) and the model's variance of the
    intercept. It resembles the length-controlled win rate of Dubois et al. 2024 (arXiv 2404.04475), without their term
    for a question's difficulty.

    Args:
        results: 1 if the first model wins, 0.5 for a tie, 0 if the second wins.
        lengths: (first, second) of each pair, in characters.
    """
    y = np.asarray(results, dtype=np.float64)
    if y.size == 0 or (y == y[0]).all():
        return None
    difference = np.array([first - second for first, second in lengths], dtype=np.float64)
    spread = difference.std()
    x = np.column_stack([np.ones_like(y), np.tanh(difference / spread) if spread > 0 else np.zeros_like(y)])
    penalty = np.diag([0.0, PENALTY])
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + penalty
        step = np.linalg.solve(hessian, x.T @ (y - p) - penalty @ weights)
        weights = weights + np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-10:
            break
    p = 1 / (1 + np.exp(-x @ weights))
    inverse = np.linalg.inv(x.T @ (x * (p * (1 - p))[:, None]) + penalty)
    residuals = x * (y - p)[:, None]
    robust = inverse @ (residuals.T @ residuals) @ inverse
    # Where length decides every pair, the robust variance vanishes although the intercept is unknown.
    error = math.sqrt(max(robust[0, 0], inverse[0, 0]))
    low, middle, high = (1 / (1 + math.exp(-(weights[0] + z * error))) for z in (-1.959964, 0, 1.959964))
    return Interval(middle, low, high, "logistic")
