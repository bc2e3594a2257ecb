"""Statistics of reward models: hand arithmetic, exhaustive enumeration, and planted faults."""

from __future__ import annotations

import math
import random
from itertools import combinations, pairwise

import pytest

from align.eval.reward_model.best_of_n import best_of_n, over_optimised
from align.eval.reward_model.pairs import (
    ScoredPair,
    accuracy,
    by_subset,
    calibration,
    length_bias,
    model_agreement,
    position_bias,
    subset_mean,
)
from align.eval.reward_model.report import agreement_lines, best_of_n_lines, pair_lines


def pair(chosen: float | None, rejected: float | None, **fields: object) -> ScoredPair:
    lengths = {"chosen_length": 10, "rejected_length": 10}
    return ScoredPair(chosen, rejected, **(lengths | fields))  # type: ignore[arg-type]


def test_accuracy_by_hand() -> None:
    pairs = [pair(2, 1, subset="a"), pair(1, 2, subset="a"), pair(1, 1, subset="b"), pair(3, 1, subset="b")]
    pairs += [pair(None, 1, subset="b"), pair(float("nan"), 1, subset="b"), pair(math.inf, math.inf, subset="b")]
    found = accuracy(pairs)
    assert (found.mean, found.n, found.unscored) == ((1 + 0 + 0.5 + 1) / 4, 4, 3)
    assert {name: summary.mean for name, summary in by_subset(pairs).items()} == {"a": 0.5, "b": 0.75}
    assert subset_mean(pairs) == 0.625
    assert subset_mean([*pairs, pair(None, 1, subset="c")]) is None  # a mean without a subset would be another mean


def test_pairs_of_one_prompt_are_one_cluster() -> None:
    repeated = [pair(1 if n % 3 else -1, 0, prompt=n) for n in range(30) for _ in range(10)]
    alone = [pair(1 if n % 3 else -1, 0) for n in range(300)]
    wide, narrow = accuracy(repeated), accuracy(alone)
    assert wide.mean == narrow.mean
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)  # type: ignore[operator]


def lengths(draw: random.Random, prefers_long: float) -> list[ScoredPair]:
    """400 pairs in which the longer completion is right in half, and a model that takes the longer one with some
    probability, otherwise the right one."""
    pairs = []
    for _ in range(400):
        longer_is_right = draw.random() < 0.5
        right = longer_is_right if draw.random() < prefers_long else True
        sizes = (20, 10) if longer_is_right else (10, 20)
        pairs.append(ScoredPair(float(right), float(not right), *sizes))
    return pairs


def test_a_model_that_prefers_length_is_named() -> None:
    biased = length_bias(lengths(random.Random(0), 0.5))
    assert biased is not None
    assert biased.direction == 1
    assert biased.extra.mean == pytest.approx(0.25, abs=0.06)  # half of the half in which the shorter one is right
    assert biased.right is not None
    assert biased.wrong is not None
    assert biased.right.mean == 1.0
    assert biased.wrong.mean == pytest.approx(0.5, abs=0.1)
    said = pair_lines("rm", lengths(random.Random(0), 0.5))
    assert any(line.startswith("  LENGTH BIAS: the model prefers the longer completion in 7") for line in said)
    honest = length_bias(lengths(random.Random(0), 0.0))
    assert honest is not None
    assert (honest.direction, honest.extra.mean) == (0, 0.0)
    assert not any("BIAS" in line for line in pair_lines("rm", lengths(random.Random(0), 0.0)))
    # Labels that prefer length themselves are not the model's bias.
    labels = [ScoredPair(1.0, 0.0, 20, 10) for _ in range(100)]
    assert length_bias(labels).direction == 0  # type: ignore[union-attr]
    assert length_bias([pair(1, 0)]) is None


def test_a_model_that_prefers_the_first_position_is_named() -> None:
    pairs = [pair(float(first), 0.5, chosen_first=first) for first in [True, False] * 50]
    found = position_bias(pairs)
    assert found is not None
    assert (found.model.mean, found.labels.mean, found.direction) == (1.0, 0.5, 1)
    assert position_bias([pair(1, 0)]) is None
    assert any("POSITION BIAS" in line for line in pair_lines("rm", pairs))


def test_calibration_by_hand() -> None:
    logit = math.log(0.82 / 0.18)
    pairs = [pair(logit, 0)] * 7 + [pair(0, logit)] * 3 + [pair(0, 0)] * 10
    found = calibration(pairs, bins=10)
    assert found is not None
    assert [(b.n, b.low, b.high) for b in found.bins] == [(10, 0.5, 0.55), (10, 0.8, 0.85)]
    assert [b.confidence for b in found.bins] == pytest.approx([0.5, 0.82])
    assert [b.accuracy.mean for b in found.bins] == pytest.approx([0.5, 0.7])
    assert found.ece == pytest.approx(0.5 * 0 + 0.5 * 0.12)
    assert found.log_loss == pytest.approx(-(7 * math.log(0.82) + 3 * math.log(0.18) + 10 * math.log(0.5)) / 20)
    assert calibration([pair(None, 1)]) is None
    assert calibration([pair(1e6, 0)]).log_loss == 0.0  # type: ignore[union-attr]


def test_a_calibrated_model_has_a_small_error() -> None:
    draw = random.Random(0)
    margins = [draw.gauss(0, 2) for _ in range(4000)]
    pairs = [pair(m, 0) if draw.random() < 1 / (1 + math.exp(-m)) else pair(-m, 0) for m in margins]
    assert calibration(pairs).ece < 0.02  # type: ignore[union-attr]
    sure = [pair(4 * p.chosen, 0) for p in pairs]  # type: ignore[operator]
    assert calibration(sure).ece > 0.1  # type: ignore[union-attr]


def test_agreement_by_hand() -> None:
    first = [pair(1, 0)] * 6 + [pair(0, 1)] * 4
    second = [pair(1, 0)] * 5 + [pair(0, 1)] * 4 + [pair(1, 0)]
    found = model_agreement([*first, pair(1, 1)], [*second, pair(1, 0)])
    assert found is not None
    assert found.n == 10  # the tie is no preference
    assert found.same.mean == 0.8
    chance = 0.6 * 0.6 + 0.4 * 0.4
    assert found.kappa == pytest.approx((0.8 - chance) / (1 - chance))
    assert (found.difference.mean, found.test.p_value) == (0.0, 1.0)  # one pair is right for each alone
    assert model_agreement([pair(None, 1)], [pair(1, 0)]) is None
    assert "prefer the same completion in 80 [" in agreement_lines("a", "b", first, second)[0]


def test_best_of_n_equals_the_mean_over_all_choices() -> None:
    draw = random.Random(0)
    for ties in (False, True):
        proxy = [[float(draw.randint(0, 3)) if ties else draw.random() for _ in range(6)] for _ in range(3)]
        gold = [[draw.random() for _ in range(6)] for _ in range(3)]
        for point in best_of_n(proxy, gold, [1, 2, 4, 6]):
            means = []
            for p, g in zip(proxy, gold, strict=True):
                found = []
                for choice in combinations(range(6), point.n):
                    best = max(p[i] for i in choice)
                    tied = [i for i in choice if p[i] == best]
                    found.append(sum(g[i] for i in tied) / len(tied))
                means.append(sum(found) / len(found))
            assert point.gold.mean == pytest.approx(sum(means) / 3)
            tops = [
                sum(max(p[i] for i in c) for c in combinations(range(6), point.n)) / math.comb(6, point.n)
                for p in proxy
            ]
            assert point.proxy.mean == pytest.approx(sum(tops) / 3)
            assert point.kl == pytest.approx(math.log(point.n) - (point.n - 1) / point.n)
    assert [point.n for point in best_of_n([[0.0] * 9], [[1.0] * 9])] == [1, 2, 4, 8]
    with pytest.raises(ValueError, match="n is 7"):
        best_of_n(proxy, gold, [7])


def test_over_optimisation_of_a_proxy_is_named() -> None:
    """The proxy is the gold score plus what the gold score punishes in extremes (Gao et al. 2022)."""
    draw = random.Random(0)
    proxy, gold = [], []
    for _ in range(200):
        quality = [draw.gauss(0, 1) for _ in range(64)]
        flaw = [draw.expovariate(1) for _ in range(64)]
        proxy.append([q + f for q, f in zip(quality, flaw, strict=True)])
        gold.append([q - 0.2 * f**2 for q, f in zip(quality, flaw, strict=True)])
    points = best_of_n(proxy, gold)
    assert [a.proxy.mean < b.proxy.mean for a, b in pairwise(points)] == [True] * 6
    best = over_optimised(points)
    assert best is not None
    assert 1 < best.n < 64
    assert best_of_n_lines(points)[-1].startswith(
        f"OVER-OPTIMISATION: the gold score is highest at n {best.n} and lower"
    )
    assert over_optimised(best_of_n(gold, gold)) is None
