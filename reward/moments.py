"""Running mean and variance of scores, used to bring rewards of different scales to one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moments:
    """Moments of a set of values, in float64; JSON stores them exactly.

    count: number of values.
    mean: their mean.
    squares: sum of their squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @staticmethod
    def of(values: Sequence[float]) -> Moments:
        if not values:
            return Moments()
        mean = math.fsum(values) / len(values)
        return Moments(len(values), mean, math.fsum((value - mean) ** 2 for value in values))

    def merged(self, other: Moments) -> Moments:
        """Moments of the union of both sets (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.squares + other.squares + delta**2 * self.count * other.count / count,
        )

    @property
    def std(self) -> float:
        """Standard deviation of the population (divided by n)."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def normalised(self, value: float) -> float:
        """(value - mean) / std; 0 while all values so far are equal."""
        # Equal values may differ in their last bits, and a division by that std would turn rounding into scores.
        negligible = self.std <= 1e-9 * max(1.0, abs(self.mean))
        return 0.0 if negligible else (value - self.mean) / self.std
