"""Confidence intervals of a mean, and of a mean difference of pairs.

`mean_interval` and `difference_interval` choose the method, so that the interval covers the true mean at its level:

    0/1 values              Wilson's score interval; the normal one and the bootstrap are too narrow near 0 and 1
    values from 0 to 1      Wilson's interval with the effective sample size and Student's t, also for clusters
    other values            BCa bootstrap for 20 values or more, Student's t for fewer
    others in clusters      Student's t with the clustered standard error
    paired 0/1 values       Bonett and Price's adjusted interval of a difference of shares

A cluster is what was drawn independently, for example a question that was sampled several times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from align.eval.statistics.arrays import Floats, cluster_sums, finite, is_binary, paired
from align.eval.statistics.student import student_t_quantile

INDICES_AT_A_TIME = 1 << 21
"""Limit on the resampled indices that are in memory at a time; one resample is always allowed."""
FEWEST_FOR_BOOTSTRAP = 20
"""Number of values from which the bootstrap is preferred to Student's t."""


class Interval(NamedTuple):
    """A mean, the ends of its confidence interval, and the name of the method."""

    mean: float
    low: float
    high: float
    method: str = ""


def mean_interval(
    values: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of some values with its interval; NaN ends if there is one value, or one cluster."""
    array = finite(values)
    if clusters is not None and len(set(clusters)) == array.size:
        clusters = None
    if clusters is None and is_binary(array):
        return wilson(int(array.sum()), array.size, level=level)
    if array.min() >= 0 and array.max() <= 1:
        return score_interval(array, clusters, level=level)
    if clusters is not None:
        return cluster_t(array, clusters, level=level)
    if array.size >= FEWEST_FOR_BOOTSTRAP:
        return bca(array, resamples=resamples, seed=seed, level=level)
    return student_t(array, level=level)


def difference_interval(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of `a - b` with its interval, where `a[i]` and `b[i]` belong to one prompt.

    The part of a prompt's difficulty that affects both alike cancels.
    """
    left, right = paired(a, b)
    repeated = clusters is not None and len(set(clusters)) < left.size
    if not repeated and left.size > 1 and is_binary(left) and is_binary(right):
        return bonett_price(int((left > right).sum()), int((left < right).sum()), left.size, level=level)
    differences = left - right
    if repeated:
        assert clusters is not None
        return cluster_t(differences, clusters, level=level)
    if differences.size >= FEWEST_FOR_BOOTSTRAP:
        return bca(differences, resamples=resamples, seed=seed, level=level)
    return student_t(differences, level=level)


# --- standard errors -----------------------------------------------------------------------------------------


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean, from the sample variance (n - 1); NaN for a single value."""
    array = finite(values)
    return float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan


def cluster_standard_error(values: ArrayLike, clusters: Sequence[object]) -> float:
    """Standard error of the mean of G clusters: sqrt(G / (G - 1) * sum of squared cluster residuals) / n.

    NaN for a single cluster. Source: Liang and Zeger 1986, as in Miller 2024 (arXiv 2411.00640).
    """
    array = finite(values)
    residuals = cluster_sums(array - array.mean(), clusters)
    count = residuals.size
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / array.size) if count > 1 else math.nan


# --- methods -------------------------------------------------------------------------------------------------


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); never empty, also at 0 and 1."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is not a share")
    share = successes / n
    low, high = _score_ends(share, n, NormalDist().inv_cdf(_upper(level)))
    return Interval(share, low, high, "wilson")


def score_interval(values: ArrayLike, clusters: Sequence[object] | None = None, *, level: float = 0.95) -> Interval:
    """Wilson's interval of the mean of values from 0 to 1.

    Its sample size is that of 0/1 values with the same mean and standard error. Never empty; NaN ends for one value or
    one cluster. Source: Korn and Graubard 1998, with Wilson's interval.

    A few skewed values often lack the rare large ones, and their standard error is too small. So the variance moves
    towards the largest that the mean allows, that of 0/1 values, by the share skewness^2 / (2 n), at most 1.
    """
    array = finite(values)
    mean, count = float(array.mean()), array.size if clusters is None else len(set(clusters))
    method = "score" if clusters is None else "cluster-score"
    if count < 2:
        return Interval(mean, math.nan, math.nan, method)
    error = standard_error(array) if clusters is None else cluster_standard_error(array, clusters)
    largest = mean * (1 - mean) / count
    residuals = array - mean if clusters is None else cluster_sums(array - mean, clusters)
    spread = float((residuals**2).mean())
    share = min(1.0, float((residuals**3).mean()) ** 2 / spread**3 / (2 * count)) if spread > 0 else 1.0
    # Without any spread, the values of a cluster may be one value repeated.
    size = mean * (1 - mean) / ((1 - share) * error**2 + share * largest) if error > 0 and largest > 0 else float(count)
    low, high = _score_ends(mean, size, student_t_quantile(_upper(level), count - 1))
    return Interval(mean, low, high, method)


def _score_ends(share: float, n: float, z: float) -> tuple[float, float]:
    """Shares p with |share - p| = z * sqrt(p (1 - p) / n)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if share == 0 else max(0.0, centre - half)
    return low, 1.0 if share == 1 else min(1.0, centre + half)


def bonett_price(only_first: int, only_second: int, n: int, *, level: float = 0.95) -> Interval:
    """Interval of the difference of two paired shares, with one pair added to each kind of discordant pair.

    only_first, only_second: pairs in which one of the two alone is 1. n: number of pairs.
    Source: Bonett and Price 2012, Adjusted Wald confidence interval for a difference of binomial proportions.
    """
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = NormalDist().inv_cdf(_upper(level)) * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    centre = first - second
    return Interval((only_first - only_second) / n, max(-1.0, centre - half), min(1.0, centre + half), "bonett-price")


def student_t(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Mean plus and minus Student's t times the standard error; NaN ends for a single value."""
    array = finite(values)
    return _t_interval(array, standard_error(array), array.size, level, "t")


def cluster_t(values: ArrayLike, clusters: Sequence[object], *, level: float = 0.95) -> Interval:
    """Like `student_t`, with the clustered standard error and one degree of freedom less than there are clusters."""
    array = finite(values)
    return _t_interval(array, cluster_standard_error(array, clusters), len(set(clusters)), level, "cluster-t")


def _t_interval(array: Floats, error: float, count: int, level: float, method: str) -> Interval:
    mean = float(array.mean())
    half = student_t_quantile(_upper(level), count - 1) * error if count > 1 else math.nan
    return Interval(mean, mean - half, mean + half, method)


def bca(values: ArrayLike, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987); NaN ends for a single value."""
    array = finite(values)
    upper = _upper(level)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; need at least 1")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, math.nan, math.nan, "bca")
    if (array == array[0]).all():
        return Interval(mean, mean, mean, "bca")
    means = resampled_means(array, resamples, np.random.default_rng(seed))
    normal = NormalDist()
    # The share of smaller means is kept off 0 and 1, where the normal quantile is infinite.
    below = ((means < mean).sum() + 0.5 * (means == mean).sum()) / resamples
    bias = normal.inv_cdf(min(max(float(below), 0.5 / resamples), 1 - 0.5 / resamples))
    residuals = array - mean  # the jackknife means differ from their mean by -residuals / (n - 1)
    acceleration = float((residuals**3).sum() / (6 * (residuals**2).sum() ** 1.5))

    def end(quantile: float) -> float:
        shifted = bias + normal.inv_cdf(quantile)
        return float(np.quantile(means, normal.cdf(bias + shifted / (1 - acceleration * shifted))))

    return Interval(mean, end(1 - upper), end(upper), "bca")


def resampled_means(array: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Means of `resamples` samples of the same size with replacement."""
    chunk = max(1, INDICES_AT_A_TIME // array.size)
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    draws = (generator.integers(0, array.size, size=(rows, array.size)) for rows in sizes)
    return np.concatenate([array[indices].mean(axis=1) for indices in draws])


def _upper(level: float) -> float:
    """Upper quantile of a two-sided interval."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; need one between 0 and 1")
    return (1 + level) / 2
