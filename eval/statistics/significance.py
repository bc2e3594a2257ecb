"""Paired tests of two models, correction for several tests, and the minimum detectable effect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from align.eval.statistics.arrays import cluster_sums, is_binary, paired
from align.eval.statistics.intervals import cluster_standard_error, standard_error

PERMUTATIONS = 10_000
SIGNS_AT_A_TIME = 1 << 22


class PairedTest(NamedTuple):
    """Two-sided p-value of the hypothesis that two models have the same mean, and the name of the test."""

    p_value: float
    method: str


def paired_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> PairedTest:
    """McNemar's exact test for 0/1 values without clusters, otherwise a permutation test."""
    left, right = paired(a, b)
    if is_binary(left) and is_binary(right) and (clusters is None or len(set(clusters)) == left.size):
        return PairedTest(mcnemar(int((left > right).sum()), int((left < right).sum())), "mcnemar")
    return PairedTest(permutation(left, right, clusters=clusters, permutations=permutations, seed=seed), "permutation")


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value of McNemar's exact test from the discordant pairs: a two-sided sign test."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return float(min(1, 2 * tail / 2**n))


def permutation(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """p-value of the mean difference if each pair is exchanged at random, all pairs of a cluster together.

    Up to `permutations` exchanges are tried: all of them if there are no more, and then the p-value is exact.
    """
    left, right = paired(a, b)
    differences = left - right
    if clusters is not None:
        differences = cluster_sums(differences, clusters)
    observed = abs(differences.sum()) * (1 - 1e-12)  # equal sums may differ in the last bit
    count = differences.size
    if 2 ** min(count, 64) <= permutations:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(signs @ differences) >= observed).mean())
    generator = np.random.default_rng(seed)
    chunk, extreme = max(1, SIGNS_AT_A_TIME // count), 0
    for start in range(0, permutations, chunk):
        size = (min(chunk, permutations - start), count)
        signs = 1 - 2 * generator.integers(0, 2, size=size, dtype=np.int8)
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (permutations + 1)  # the observed exchange is one of them


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): the family-wise error rate stays below the level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def minimum_detectable_effect(
    a: ArrayLike, b: ArrayLike, *, clusters: Sequence[object] | None = None, level: float = 0.95, power: float = 0.8
) -> float:
    """Smallest true difference that a test at this level finds with this power, from the spread of the differences.

    NaN for a single pair, and if all differences are equal, because their spread is then unknown. With the defaults it
    is 2.80 standard errors.
    """
    left, right = paired(a, b)
    differences = left - right
    error = standard_error(differences) if clusters is None else cluster_standard_error(differences, clusters)
    if error == 0:
        return float("nan")
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * error
