"""Statistics against scipy 1.17.1, statsmodels 0.15.0 and choix 0.4.1, hand arithmetic and exact coverage.

The libraries' values are literals; each test names the call that gives them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.eval.statistics import intervals
from align.eval.statistics.intervals import (
    bca,
    bonett_price,
    cluster_standard_error,
    cluster_t,
    difference_interval,
    mean_interval,
    score_interval,
    standard_error,
    student_t,
    wilson,
)
from align.eval.statistics.passes import pass_at_k
from align.eval.statistics.ratings import ELO, Comparison, bradley_terry, rate
from align.eval.statistics.significance import holm, mcnemar, minimum_detectable_effect, paired_test, permutation
from align.eval.statistics.student import student_t_cdf, student_t_quantile
from align.eval.statistics.summary import summarize

SKEWED = [0.31, 2.4, 1.1, 0.02, 5.7, 0.9, 0.4, 3.3, 0.15, 1.9, 0.7, 2.2, 0.05, 9.1, 1.4, 0.6, 0.8, 2.9, 0.25, 1.2, 0.45]
SKEWED += [3.8]
CLUSTERS = [0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4]
CLUSTERED = [1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0]

# --- intervals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 30, 0.0, 0.1135133931739688),
        (27, 30, 0.7437891742081592, 0.9654001112526659),
        (32, 64, 0.38102094743947007, 0.6189790525605299),
        (459, 540, 0.8174160209758586, 0.8776394843908762),
        (5, 5, 0.5655175352168252, 1.0),
    ],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    """statsmodels.stats.proportion.proportion_confint(successes, n, method="wilson")"""
    assert wilson(successes, n) == (pytest.approx(successes / n), pytest.approx(low), pytest.approx(high), "wilson")


@pytest.mark.parametrize("n", [30, 64, 540])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_wilson_covers_the_true_share(n: int, p: float) -> None:
    """The exact probability that the interval contains p, a sum over the binomial distribution."""
    covered = 0.0
    for k in range(n + 1):
        interval = wilson(k, n)
        if interval.low <= p <= interval.high:
            covered += math.exp(
                math.lgamma(n + 1)
                - math.lgamma(k + 1)
                - math.lgamma(n - k + 1)
                + k * math.log(p)
                + (n - k) * math.log(1 - p)
            )
    assert 0.93 <= covered <= 0.98


@pytest.mark.parametrize(("n", "p"), [(64, 0.05), (64, 0.5), (64, 0.9)])
def test_clusters_are_covered(n: int, p: float) -> None:
    """benchmarks/interval_coverage.py has all sizes; prompts of varying difficulty, four samples of each."""
    generator = np.random.default_rng(0)
    labels, covered = list(np.repeat(np.arange(n), 4)), 0
    for _ in range(400):
        difficulty = np.repeat(generator.beta(2 * p, 2 * (1 - p), size=n), 4)
        interval = mean_interval((generator.random(4 * n) < difficulty).astype(float), clusters=labels)
        covered += interval.low <= p <= interval.high
    assert 0.92 <= covered / 400 <= 0.985  # a standard deviation is 0.011


@pytest.mark.parametrize(("n", "p"), [(30, 0.05), (64, 0.05), (30, 0.9)])
def test_skewed_values_from_0_to_1_are_covered(n: int, p: float) -> None:
    """Most values are near 0 or 1: with n = 30 and p = 0.05, their own standard error covers 89 %."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(600):
        interval = mean_interval(generator.beta(2 * p, 2 * (1 - p), size=n))
        covered += interval.low <= p <= interval.high
    assert 0.93 <= covered / 600 <= 0.98  # a standard deviation is 0.009


def test_students_t() -> None:
    """scipy.stats.t.ppf(0.975, d); ppf(0.9, 3); cdf(-1.3, 7)"""
    expected = {
        1: 12.706204736174694,
        2: 4.302652729749462,
        5: 2.5705818356363146,
        29: 2.045229642132703,
        539: 1.9643749615057766,
    }
    assert {d: student_t_quantile(0.975, d) for d in expected} == pytest.approx(expected, rel=1e-10)
    assert student_t_quantile(0.9, 3) == pytest.approx(1.637744353696209, rel=1e-10)
    assert student_t_quantile(0.1, 3) == pytest.approx(-1.637744353696209, rel=1e-10)
    assert student_t_cdf(-1.3, 7) == pytest.approx(0.11738391769618862, rel=1e-10)


def test_student_t_interval() -> None:
    """scipy.stats.t.interval(0.95, 21, loc=numpy.mean(v), scale=scipy.stats.sem(v))"""
    assert student_t(SKEWED)[1:3] == pytest.approx((0.8371423857987026, 2.76558488692857))


def test_bca_bootstrap() -> None:
    """scipy.stats.bootstrap((v,), numpy.mean, n_resamples=200000, method="BCa"); percentiles give 1.05, 2.76."""
    interval = bca(SKEWED, resamples=100_000)
    assert interval[1:3] == pytest.approx((1.1395, 3.0753), abs=0.03)


def test_clustered_standard_error() -> None:
    """statsmodels OLS on a constant, cov_type="cluster" without correction, times sqrt(G / (G - 1))."""
    assert cluster_standard_error(CLUSTERED, CLUSTERS) == pytest.approx(0.16666667 * math.sqrt(5 / 4), rel=1e-6)
    low = cluster_t(CLUSTERED, CLUSTERS).low
    assert low == pytest.approx(0.5 - student_t_quantile(0.975, 4) * 0.186339, rel=1e-5)


def test_one_value_per_cluster_is_no_clustering() -> None:
    values = np.random.default_rng(0).random(30)
    assert cluster_standard_error(values, list(range(30))) == pytest.approx(standard_error(values))
    assert mean_interval(values, clusters=list("abcdefghijklmnopqrstuvwxyzABCD")) == mean_interval(values)


def test_repeated_values_do_not_narrow_an_interval() -> None:
    """Four equal samples per prompt tell no more than one: Wilson's interval of 30 prompts, with t instead of z."""
    once = [1.0] * 24 + [0.0] * 6
    labels = [i for i in range(30) for _ in range(4)]
    repeated = mean_interval([value for value in once for _ in range(4)], clusters=labels)
    assert repeated.low < wilson(24, 30).low
    assert repeated.low == pytest.approx(wilson(24, 30).low, abs=0.02)
    assert mean_interval([1.0] * 120, clusters=labels).low == pytest.approx(30 / (30 + 2.045229642132703**2))


def test_score_interval_of_binary_values_is_close_to_wilsons() -> None:
    values = [1.0] * 400 + [0.0] * 140
    assert score_interval(values)[1:3] == pytest.approx(wilson(400, 540)[1:3], abs=0.0005)


def test_paired_shares_by_hand() -> None:
    # 9 and 1 discordant pairs of 30: shares (9 + 1) / 32 and (1 + 1) / 32, difference 1/4, variance (3/8 - 1/16) / 32.
    half = 1.959963984540054 * math.sqrt((3 / 8 - 1 / 16) / 32)
    assert bonett_price(9, 1, 30)[:3] == pytest.approx((8 / 30, 0.25 - half, 0.25 + half))
    first, second = [1.0] * 9 + [0.0] * 21, [0.0] * 9 + [1.0] + [0.0] * 20
    assert difference_interval(first, second) == bonett_price(9, 1, 30)


def test_equal_models_have_an_interval() -> None:
    interval = difference_interval([1.0, 0.0] * 32, [1.0, 0.0] * 32)
    assert interval.low == -interval.high < -0.02


def test_methods_are_chosen_by_the_values() -> None:
    assert mean_interval([0, 1, 1]).method == "wilson"
    assert mean_interval([0, 0.5, 1]).method == "score"
    assert mean_interval(CLUSTERED, clusters=CLUSTERS).method == "cluster-score"
    assert mean_interval([2, 3, 5]).method == "t"
    assert mean_interval(SKEWED).method == "bca"
    assert mean_interval(SKEWED[:12], clusters=CLUSTERS).method == "cluster-t"
    assert difference_interval(SKEWED, [0.0] * 22).method == "bca"
    assert difference_interval(CLUSTERED, [0.0] * 12, clusters=CLUSTERS).method == "cluster-t"


def test_bootstrap_is_reproducible_and_depends_on_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bca(SKEWED, resamples=100, seed=1)
    assert whole != bca(SKEWED, resamples=100, seed=2)
    monkeypatch.setattr(intervals, "INDICES_AT_A_TIME", 7 * len(SKEWED))
    assert bca(SKEWED, resamples=100, seed=1) == whole


def test_pairing_removes_the_variance_that_prompts_share() -> None:
    hard = np.random.default_rng(2).normal(scale=100.0, size=50)
    assert difference_interval(hard + 1.0, hard)[:3] == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("method", [student_t, bca, score_interval])
def test_a_single_value_has_no_interval(method: object) -> None:
    assert callable(method)
    interval = method([0.5])
    assert interval.mean == 0.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert math.isnan(cluster_t([0.5, 2.0], ["a", "a"]).low)


@pytest.mark.parametrize("bad", [[], [[1.0]], [1.0, math.nan]])
def test_other_values_than_a_list_of_numbers_are_refused(bad: list) -> None:
    with pytest.raises(ValueError, match=r"need a non-empty|not finite"):
        mean_interval(bad)


def test_unpaired_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        difference_interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="3 values and 2 clusters"):
        cluster_standard_error([1, 2, 3], ["a", "b"])


# --- tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "p"), [(1, 9, 0.021484375), (4, 6, 0.75390625), (0, 0, 1.0), (3, 20, 0.00048828125)]
)
def test_mcnemar(first: int, second: int, p: float) -> None:
    """statsmodels.stats.contingency_tables.mcnemar([[10, first], [second, 5]], exact=True)"""
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-12)


def test_permutation_of_few_pairs_is_exact() -> None:
    """scipy.stats.permutation_test((a, b), mean of a - b, permutation_type="samples", n_resamples=inf)"""
    a, b = [0.9, 0.4, 0.7, 0.2, 0.8, 0.5, 0.6, 0.3], [0.6, 0.5, 0.3, 0.1, 0.9, 0.2, 0.4, 0.2]
    assert permutation(a, b) == 0.09375
    assert paired_test(a, b) == (0.09375, "permutation")


def test_permutation_of_many_pairs() -> None:
    """scipy.stats.permutation_test(..., n_resamples=100000) gives 0.1195."""
    generator = np.random.default_rng(3)
    a, b = generator.normal(0.3, 1, 60), generator.normal(0, 1, 60)
    assert permutation(a, b, permutations=50_000) == pytest.approx(0.1195, abs=0.006)


def test_clusters_are_exchanged_together() -> None:
    # Two clusters of equal differences: of the four exchanges two are as extreme as the observed one.
    a = np.array([1.0, 1.0, 1.0, 1.0])
    assert permutation(a, a * 0) == 2 / 16
    assert permutation(a, a * 0, clusters=["a", "a", "b", "b"]) == 2 / 4
    assert paired_test(a, a * 0, clusters=["a", "a", "b", "b"]).method == "permutation"
    assert paired_test(a, a * 0) == (2 / 16, "mcnemar")


def test_holm() -> None:
    """statsmodels.stats.multitest.multipletests(p, method="holm")"""
    assert holm([0.01, 0.04, 0.03, 0.005, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    assert holm([]) == []


def test_minimum_detectable_effect_is_found_with_its_power() -> None:
    """scipy.stats.norm.ppf(0.975) + ppf(0.8) = 2.8016; in simulations a t test finds it in four of five cases."""
    differences = np.random.default_rng(0).normal(size=400)
    effect = minimum_detectable_effect(differences, differences * 0)
    assert effect == pytest.approx(2.8015852181129683 * differences.std(ddof=1) / 20)
    samples = np.random.default_rng(1).normal(effect, differences.std(), size=(2000, 400))
    found = np.abs(samples.mean(1)) / (samples.std(1, ddof=1) / 20) > 1.96
    assert 0.77 <= found.mean() <= 0.83


def test_no_effect_is_detectable_where_no_pair_differs() -> None:
    """The spread of the differences is unknown, not zero: no difference of size 0 is found."""
    assert math.isnan(minimum_detectable_effect([1, 0, 1, 1], [1, 0, 1, 1]))
    assert math.isnan(minimum_detectable_effect([2.5, 1.5, 0.5], [2, 1, 0]))


# --- ratings and passes --------------------------------------------------------------------------------------

WINS = np.array([[0, 7, 9, 10], [3, 0, 6, 8], [1, 4, 0, 5], [0, 2, 5, 0]], float)


def test_bradley_terry() -> None:
    """choix.opt_pairwise(4, data, alpha=0) and ilsr_pairwise; with a prior, scipy's BFGS on the same likelihood."""
    assert bradley_terry(WINS, prior=0) == pytest.approx([1.480135, 0.211084, -0.649862, -1.041358], abs=2e-6)
    assert bradley_terry(WINS) == pytest.approx([1.428404, 0.206871, -0.627896, -1.007378], abs=2e-6)


def test_a_model_that_always_wins_needs_a_prior() -> None:
    wins = np.array([[0.0, 5.0], [0.0, 0.0]])
    assert bradley_terry(wins)[0] == pytest.approx(math.log(5.1 / 0.1) / 2)
    with pytest.raises(ValueError, match="not won once"):
        bradley_terry(wins, prior=0)


def test_ratings_by_hand_with_the_question_as_unit() -> None:
    # a wins 30 of 40 questions, in both orders: odds 3, so the ratings are 400 * log10(3) points apart.
    comparisons = [
        Comparison(*(pair if order else pair[::-1]), float((q < 30) == order), q)
        for q in range(40)
        for order, pair in ((True, ("a", "b")), (False, ("a", "b")))
    ]
    found = rate(comparisons, prior=0, resamples=200)
    assert list(found) == ["a", "b"]
    assert found["a"].rating - found["b"].rating == pytest.approx(400 * math.log10(3), rel=1e-6)
    assert found["a"].n == 80
    # The standard error of the log odds of 40 independent questions is sqrt(1 / 30 + 1 / 10).
    width = found["a"].high - found["a"].low
    assert width == pytest.approx(2 * 1.96 * ELO / 2 * math.sqrt(1 / 30 + 1 / 10), rel=0.25)


def test_a_tie_counts_half_for_both() -> None:
    found = rate([Comparison("a", "b", 0.5, q) for q in range(10)], resamples=10)
    assert found["a"].rating == pytest.approx(0.0)


def test_pass_at_k() -> None:
    # 3 of 10 pass: all of 5 fail in C(7, 5) = 21 of C(10, 5) = 252 draws.
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert [pass_at_k(4, c, 1) for c in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert pass_at_k(5, 3, 3) == 1.0
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)


# --- summaries -----------------------------------------------------------------------------------------------


def test_standard_error_by_hand() -> None:
    # Deviations -3, -1, 1, 3: sample variance 20/3, so the variance of the mean of 4 values is 20/3 / 4.
    assert standard_error([1, 3, 5, 7]) == pytest.approx(math.sqrt(20 / 3 / 4))
    assert math.isnan(standard_error([1.0]))


def test_a_summary_leaves_unscored_prompts_out() -> None:
    summary = summarize([1.0, None, 3.0, 5.0, 7.0, None], resamples=100, seed=0)
    assert (summary.mean, summary.n, summary.unscored, summary.not_finite, summary.method) == (4.0, 4, 2, 0, "t")
    assert summary.standard_error == pytest.approx(math.sqrt(20 / 3 / 4))
    assert summary.low == pytest.approx(4 - 3.182446305284263 * math.sqrt(20 / 3 / 4))  # scipy.stats.t.ppf(0.975, 3)


def test_a_summary_keeps_the_clusters_of_what_is_scored() -> None:
    values = [value for value in CLUSTERED for value in (value, None)]
    labels = [label for label in CLUSTERS for _ in range(2)]
    summary = summarize(values, resamples=100, seed=0, clusters=labels)
    assert summary.standard_error == pytest.approx(0.186339, rel=1e-5)
    assert (summary.n, summary.unscored) == (12, 12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_summary_with_a_value_that_is_not_finite_has_no_mean(bad: float) -> None:
    summary = summarize([1.0, bad, None, 0.0], resamples=100, seed=0)
    assert summary == (None, None, None, None, 3, 1, 1, "")


def test_a_summary_of_nothing_has_no_mean() -> None:
    assert summarize([None, None], resamples=100, seed=0) == (None, None, None, None, 0, 2, 0, "")


def test_a_summary_of_one_value_has_a_mean_alone() -> None:
    assert summarize([2.0], resamples=100, seed=0) == (2.0, None, None, None, 1, 0, 0, "")
