"""Coverage of the 95 % intervals in simulations: the share that contains the true mean. Takes about a minute.

    python benchmarks/interval_coverage.py [--simulations 1000]

Rows: n prompts with a true mean p. Columns:

    wilson           0/1 values, the interval of `mean_interval`
    normal           0/1 values, mean plus and minus 1.96 standard errors, for comparison
    bootstrap        0/1 values, percentile bootstrap, for comparison
    clusters         0/1 values, four samples of each prompt, whose difficulty varies (beta distribution)
    shares           values between 0 and 1 (beta distribution, very skewed near 0 and 1), `mean_interval`
    difference       paired 0/1 values of two models, a third of whose answers are independent, `difference_interval`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from align.eval.statistics.intervals import (
    Interval,
    difference_interval,
    mean_interval,
    resampled_means,
    standard_error,
)

SIZES = (30, 64, 540)
SHARES = (0.05, 0.5, 0.9)
SAMPLES = 4
RESAMPLES = 1000
SPREAD = 2.0
"""Sum of the parameters of a beta distribution; the variance of a prompt's difficulty is p (1 - p) / (1 + SPREAD)."""

Simulation = Callable[[np.random.Generator, int, float], tuple[Interval, float]]
"""One simulation with n prompts of mean p: (interval, true value)."""


def wilson(generator: np.random.Generator, n: int, p: float) -> tuple[Interval, float]:
    return mean_interval((generator.random(n) < p).astype(float)), p


def normal(generator: np.random.Generator, n: int, p: float) -> tuple[Interval, float]:
    values = (generator.random(n) < p).astype(float)
    half = 1.959964 * standard_error(values)
    return Interval(values.mean(), values.mean() - half, values.mean() + half), p


def bootstrap(generator: np.random.Generator, n: int, p: float) -> tuple[Interval, float]:
    values = (generator.random(n) < p).astype(float)
    low, high = np.quantile(resampled_means(values, RESAMPLES, generator), [0.025, 0.975])
    return Interval(values.mean(), low, high), p


def clusters(generator: np.random.Generator, n: int, p: float) -> tuple[Interval, float]:
    difficulty = np.repeat(generator.beta(SPREAD * p, SPREAD * (1 - p), size=n), SAMPLES)
    values = (generator.random(n * SAMPLES) < difficulty).astype(float)
    return mean_interval(values, clusters=list(np.repeat(np.arange(n), SAMPLES))), p


def shares(generator: np.random.Generator, n: int, p: float) -> tuple[Interval, float]:
    values = generator.beta(SPREAD * p, SPREAD * (1 - p), size=n)
    return mean_interval(values), p


def difference(generator: np.random.Generator, n: int, p: float) -> tuple[Interval, float]:
    first = generator.random(n) < p
    second = np.where(generator.random(n) < 1 / 3, generator.random(n) < p, first)
    return difference_interval(first.astype(float), second.astype(float)), 0.0


COLUMNS: dict[str, Simulation] = {
    "wilson": wilson,
    "normal": normal,
    "bootstrap": bootstrap,
    "clusters": clusters,
    "shares": shares,
    "difference": difference,
}


def coverage(simulate: Simulation, n: int, p: float, simulations: int, seed: int = 0) -> float:
    """Share of the intervals that contain the true value."""
    generator = np.random.default_rng(seed)
    covered = 0
    for _ in range(simulations):
        interval, true = simulate(generator, n, p)
        covered += interval.low <= true <= interval.high
    return covered / simulations


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    simulations = parser.parse_args().simulations
    print("  n     p", *(f"{name:>14}" for name in COLUMNS))
    for n in SIZES:
        for p in SHARES:
            shares = [coverage(simulate, n, p, simulations) for simulate in COLUMNS.values()]
            print(f"{n:3}  {p:.2f}", *(f"{share:14.3f}" for share in shares), flush=True)
