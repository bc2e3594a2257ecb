"""Metrics against hand arithmetic and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.eval.metrics import (
    bootstrap_interval,
    paired_bootstrap_difference,
    pairwise_accuracy,
    standard_error,
)
from align.reward.text import token_f1


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # 2 shared of 3 predicted and 4 expected words: precision 2/3, recall 2/4, F1 = 4/7.
        ("return the list", "Return a new list.", 4 / 7),
        # A bag, not a set: "a" counts once, so precision 1/3, recall 1/2.
        ("a a a", "a b", 0.4),
        ("Same, words!", "same words", 1.0),
        ("left", "right", 0.0),
        ("", "", 1.0),
        ("", "word", 0.0),
        ("...", "word", 0.0),
        ("«Grüße»", "grüße", 1.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected, abs=1e-12)
    assert token_f1(reference, prediction) == pytest.approx(expected, abs=1e-12)


def test_pairwise_accuracy_counts_ties_half() -> None:
    assert pairwise_accuracy([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == pytest.approx(2.5 / 4)


def test_standard_error_by_hand() -> None:
    # Deviations -3, -1, 1, 3: variance 20/3, divided by 4.
    assert standard_error([1, 3, 5, 7]) == pytest.approx(math.sqrt(20 / 3 / 4))
    assert math.isnan(standard_error([1.0]))


def test_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    mean, low, high = bootstrap_interval(values, resamples=20_000, seed=3)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(values.size)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.05 * half)
    assert high == pytest.approx(mean + half, abs=0.05 * half)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
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
    monkeypatch.setattr("align.eval.metrics.INDICES_AT_A_TIME", 7 * 30)
    assert bootstrap_interval(values, resamples=100, seed=1) == whole


def test_pairing_removes_what_the_prompts_share() -> None:
    hard = np.random.default_rng(2).normal(scale=100.0, size=50)
    assert paired_bootstrap_difference(hard + 1.0, hard) == pytest.approx((1.0, 1.0, 1.0))


def test_a_single_value_has_no_interval() -> None:
    mean, low, high = bootstrap_interval([2.0])
    assert mean == 2.0
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("bad", [[], [[1.0]], [1.0, math.nan]])
def test_what_is_not_a_list_of_numbers_is_refused(bad: list) -> None:
    with pytest.raises(ValueError, match=r"need a non-empty|not finite"):
        bootstrap_interval(bad)


def test_unpaired_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        paired_bootstrap_difference([1, 2], [1, 2, 3])
