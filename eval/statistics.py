"""Statistics of an evaluation: means, standard errors, and bootstrap intervals over prompts.

A value that cannot be known, such as the interval of a single prompt, is NaN or None and never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

INDICES_AT_A_TIME = 1 << 21
"""Limit on the resampled indices that are in memory at a time; one resample is always allowed."""


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


class Summary(NamedTuple):
    """Statistics of one value per prompt.

    mean, standard_error, low, high: over the scored values; None if unknown.
    n: number of scored values.
    unscored: prompts without a value.
    not_finite: scored values that are NaN or infinite. If there are any, the four statistics above are None.
    """

    mean: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    not_finite: int


def summarize(values: Sequence[float | None], *, resamples: int, seed: int) -> Summary:
    """Mean, standard error and 95 % bootstrap interval of the values that are not None."""
    scored = np.array([value for value in values if value is not None], dtype=np.float64)
    unscored, not_finite = len(values) - scored.size, int((~np.isfinite(scored)).sum())
    if not scored.size or not_finite:
        return Summary(None, None, None, None, int(scored.size), unscored, not_finite)
    interval = bootstrap_interval(scored, resamples=resamples, seed=seed)
    return Summary(
        interval.mean,
        _known(standard_error(scored)),
        _known(interval.low),
        _known(interval.high),
        int(scored.size),
        unscored,
        0,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean, from the sample variance (n - 1); NaN for a single value."""
    array = _finite(values)
    return float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan


def bootstrap_interval(values: ArrayLike, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of `values` with its percentile bootstrap interval (Efron 1979); NaN ends for a single value."""
    array = _finite(values)
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples is {resamples} and level {level}; need at least 1, and one between 0 and 1")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, math.nan, math.nan)
    means = _resampled_means(array, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def paired_bootstrap_difference(
    a: ArrayLike, b: ArrayLike, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of `a - b` with its interval, where `a[i]` and `b[i]` belong to prompt i.

    The differences are resampled, so the part of a prompt's difficulty that affects both models alike cancels.
    """
    left, right = paired(a, b)
    return bootstrap_interval(left - right, resamples=resamples, seed=seed, level=level)


def paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both lists as arrays of finite values of the same length."""
    left, right = _finite(a), _finite(b)
    if left.size != right.size:
        raise ValueError(f"the two lists must be paired, but have {left.size} and {right.size} values")
    return left, right


def _resampled_means(array: NDArray[np.float64], resamples: int, generator: np.random.Generator) -> NDArray:
    chunk = max(1, INDICES_AT_A_TIME // array.size)
    sizes: Sequence[int] = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    draws = (generator.integers(0, array.size, size=(rows, array.size)) for rows in sizes)
    return np.concatenate([array[indices].mean(axis=1) for indices in draws])


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"need a non-empty list of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
    return array
