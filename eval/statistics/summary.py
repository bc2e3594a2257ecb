"""Statistics of one value per prompt: mean, interval, and the counts of excluded values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from align.eval.statistics.intervals import cluster_standard_error, mean_interval, standard_error


class Summary(NamedTuple):
    """Statistics of one value per prompt.

    mean, standard_error, low, high: over the scored values; None if unknown.
    n: number of scored values.
    unscored: prompts without a value.
    not_finite: scored values that are NaN or infinite. If there are any, the four statistics above are None.
    method: how the interval was computed; empty if there is none (see `intervals`).
    """

    mean: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    not_finite: int
    method: str = ""


def summarize(
    values: Sequence[float | None], *, resamples: int, seed: int, clusters: Sequence[object] | None = None
) -> Summary:
    """Mean, standard error and 95 % interval of the values that are not None.

    clusters: label of each value if some belong together, for example several completions of one prompt.
    """
    places = [i for i, value in enumerate(values) if value is not None]
    scored = np.array([values[i] for i in places], dtype=np.float64)
    unscored, not_finite = len(values) - scored.size, int((~np.isfinite(scored)).sum())
    if not scored.size or not_finite:
        return Summary(None, None, None, None, int(scored.size), unscored, not_finite)
    labels = None if clusters is None else [clusters[i] for i in places]
    interval = mean_interval(scored, clusters=labels, resamples=resamples, seed=seed)
    error = standard_error(scored) if labels is None else cluster_standard_error(scored, labels)
    low = _known(interval.low)
    return Summary(
        interval.mean,
        _known(error),
        low,
        _known(interval.high),
        int(scored.size),
        unscored,
        0,
        "" if low is None else interval.method,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
