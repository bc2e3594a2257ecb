"""Check the numbers that a statistic gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def finite(values: ArrayLike) -> Floats:
    """A non-empty list of finite numbers as an array."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"need a non-empty list of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
    return array


def paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    """Both lists as arrays of finite values of the same length."""
    left, right = finite(a), finite(b)
    if left.size != right.size:
        raise ValueError(f"the two lists must be paired, but have {left.size} and {right.size} values")
    return left, right


def is_binary(array: Floats) -> bool:
    """True if every value is 0 or 1."""
    return bool(((array == 0) | (array == 1)).all())


def cluster_sums(array: Floats, clusters: Sequence[object]) -> Floats:
    """Sum of the values of each cluster. clusters: label of each value, for example its question."""
    if len(clusters) != array.size:
        raise ValueError(f"each value needs a cluster, but there are {array.size} values and {len(clusters)} clusters")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros(len(numbers))
    np.add.at(sums, [numbers[label] for label in clusters], array)
    return sums
