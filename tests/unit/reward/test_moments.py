"""Running moments against NumPy on all values at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from align.reward.moments import Moments


def test_merged_moments_equal_those_of_all_values() -> None:
    generator = np.random.default_rng(0)
    for trial in range(200):
        sizes = generator.integers(0, 40, size=6)
        offset = 10.0 ** generator.integers(-3, 7)  # with a large mean, a naive sum of squares loses precision
        parts = [(offset + generator.normal(size=size)).tolist() for size in sizes]
        values = np.concatenate(parts)
        if not len(values):
            continue
        moments = Moments()
        for part in parts:
            moments = moments.merged(Moments.of(part))
        assert moments.count == len(values)
        assert moments.mean == pytest.approx(values.mean(), rel=1e-12), trial
        assert moments.std == pytest.approx(values.std(), rel=1e-6, abs=1e-9), trial


def test_normalised_scores_have_mean_0_and_variance_1() -> None:
    values = np.random.default_rng(1).normal(5.0, 3.0, size=500).tolist()
    moments = Moments.of(values)
    scaled = np.array([moments.normalised(value) for value in values])
    assert scaled.mean() == pytest.approx(0.0, abs=1e-12)
    assert scaled.std() == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 0.1, 1e9, 1e-30])
def test_equal_scores_become_0(value: float) -> None:
    moments = Moments.of([value] * 7).merged(Moments.of([value] * 3))
    assert moments.normalised(value) == 0.0


def test_one_score_and_none() -> None:
    assert Moments.of([2.5]).normalised(2.5) == 0.0
    assert Moments().merged(Moments()) == Moments()
    assert Moments.of([]) == Moments()


def test_json_stores_moments_exactly() -> None:
    moments = Moments.of([0.1, 1 / 3, 2e-9])
    kept = json.loads(json.dumps([moments.count, moments.mean, moments.squares]))
    assert Moments(*kept) == moments
