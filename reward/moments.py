"""Mean and variance of all scores so far, for rewards of unlike scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean; in float64, exact in JSON."""

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
        """The moments of both sets of values together (Chan, Golub and LeVeque 1979)."""
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
        """Of the population: divided by n."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def normalised(self, value: float) -> float:
        """Deviations from the mean in standard deviations; 0 while all values so far are equal."""
        # Equal values may differ in their last bits, which a division would blow up to a score.
        negligible = self.std <= 1e-9 * max(1.0, abs(self.mean))
        return 0.0 if negligible else (value - self.mean) / self.std
