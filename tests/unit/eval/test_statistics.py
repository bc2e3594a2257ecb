"""Statistics against hand arithmetic and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.eval.statistics import (
    bootstrap_interval,
    paired_bootstrap_difference,
    standard_error,
    summarize,
)


def test_standard_error_by_hand() -> None:
    # Deviations -3, -1, 1, 3: sample variance 20/3, so the variance of the mean of 4 values is 20/3 / 4.
    assert standard_error([1, 3, 5, 7]) == pytest.approx(math.sqrt(20 / 3 / 4))
    assert math.isnan(standard_error([1.0]))


def test_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    mean, low, high = bootstrap_interval(values, resamples=20_000, seed=3)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(values.size)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.05 * half)
    assert high == pytest.approx(mean + half, abs=0.05 * half)


def test_interval_covers_the_true_mean_at_its_level() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(400):
        interval = bootstrap_interval(generator.normal(size=60), resamples=400, seed=seed, level=0.9)
        covered += interval.low <= 0.0 <= interval.high
    # 360 expected, standard deviation 6; the percentile interval of 60 values is a little narrow.
    assert 335 <= covered <= 378


def test_two_values_have_three_equally_spaced_means() -> None:
    # Resamples of (0, 1) have the mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], resamples=4000, level=0.4)[1:] == (0.5, 0.5)
    assert bootstrap_interval([0.0, 1.0], resamples=4000, level=0.6)[1:] == (0.0, 1.0)


def test_interval_is_reproducible_and_depends_on_the_seed() -> None:
    values = list(range(30))
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_chunks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(range(30))
    whole = bootstrap_interval(values, resamples=100, seed=1)
    monkeypatch.setattr("align.eval.statistics.INDICES_AT_A_TIME", 7 * 30)
    assert bootstrap_interval(values, resamples=100, seed=1) == whole


def test_pairing_removes_the_variance_that_prompts_share() -> None:
    hard = np.random.default_rng(2).normal(scale=100.0, size=50)
    assert paired_bootstrap_difference(hard + 1.0, hard) == pytest.approx((1.0, 1.0, 1.0))


def test_a_single_value_has_no_interval() -> None:
    mean, low, high = bootstrap_interval([2.0])
    assert mean == 2.0
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("bad", [[], [[1.0]], [1.0, math.nan]])
def test_other_values_than_a_list_of_numbers_are_refused(bad: list) -> None:
    with pytest.raises(ValueError, match=r"need a non-empty|not finite"):
        bootstrap_interval(bad)


def test_unpaired_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        paired_bootstrap_difference([1, 2], [1, 2, 3])


def test_a_summary_leaves_unscored_prompts_out() -> None:
    summary = summarize([1.0, None, 3.0, 5.0, 7.0, None], resamples=100, seed=0)
    assert (summary.mean, summary.n, summary.unscored, summary.not_finite) == (4.0, 4, 2, 0)
    assert summary.standard_error == pytest.approx(math.sqrt(20 / 3 / 4))
    assert summary.low is not None
    assert summary.high is not None
    assert 1.0 <= summary.low < 4.0 < summary.high <= 7.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_summary_with_a_value_that_is_not_finite_has_no_mean(bad: float) -> None:
    summary = summarize([1.0, bad, None, 0.0], resamples=100, seed=0)
    assert summary == (None, None, None, None, 3, 1, 1)


def test_a_summary_of_nothing_has_no_mean() -> None:
    assert summarize([None, None], resamples=100, seed=0) == (None, None, None, None, 0, 2, 0)


def test_a_summary_of_one_value_has_a_mean_alone() -> None:
    assert summarize([2.0], resamples=100, seed=0) == (2.0, None, None, None, 1, 0, 0)
