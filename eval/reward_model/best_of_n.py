"""Best-of-n: the gold score of the completion that a proxy prefers among n, and over-optimisation of the proxy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from align.eval.statistics.intervals import Interval, mean_interval


class BestOfN(NamedTuple):
    """One point of the curve.

    n: number of completions per choice.
    kl: KL divergence of best-of-n from the sampling distribution, log(n) - (n - 1) / n (an upper bound).
    proxy, gold: expected scores of the chosen completion, as means over prompts with their intervals.
    """

    n: int
    kl: float
    proxy: Interval
    gold: Interval


def best_of_n(
    proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], sizes: Sequence[int] | None = None
) -> list[BestOfN]:
    """The curve of some prompts, each with N completions scored by both.

    Each point is the exact mean over all choices of n of the N completions of a prompt, so no completion is wasted.
    sizes: values of n. Default: 1, 2, 4, ... up to N.
    """
    if not proxy or len(proxy) != len(gold):
        raise ValueError(f"need the same prompts for both, got {len(proxy)} and {len(gold)}")
    count = min(map(len, proxy))
    if any(len(a) != len(b) for a, b in zip(proxy, gold, strict=True)):
        raise ValueError("a prompt has other numbers of proxy and gold scores")
    if sizes is None:
        sizes = [2**power for power in range(count.bit_length()) if 2**power <= count]
    points = []
    for n in sizes:
        if not 1 <= n <= count:
            raise ValueError(f"n is {n}, but a prompt has {count} completions")
        found = [_expected(p, g, n) for p, g in zip(proxy, gold, strict=True)]
        by_proxy, by_gold = (mean_interval([pair[place] for pair in found]) for place in (0, 1))
        points.append(BestOfN(n, math.log(n) - (n - 1) / n, by_proxy, by_gold))
    return points


def over_optimised(points: Sequence[BestOfN]) -> BestOfN | None:
    """The point with the highest gold score, if the last point is below it by more than both intervals; else None."""
    best, last = max(points, key=lambda point: point.gold.mean), points[-1]
    return best if last.gold.high < best.gold.low else None


def _expected(proxy: Sequence[float], gold: Sequence[float], n: int) -> tuple[float, float]:
    """Expected proxy and gold score of the best of n of these completions.

    Completions with equal proxy scores are chosen with equal probability.
    """
    order = sorted(range(len(proxy)), key=lambda i: proxy[i])
    total = math.comb(len(proxy), n)
    by_proxy = by_gold = 0.0
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and proxy[order[end]] == proxy[order[start]]:
            end += 1
        # A choice of n has its best among these if all are below `end` and not all are below `start`.
        share = (math.comb(end, n) - math.comb(start, n)) / total
        by_proxy += share * proxy[order[start]]
        by_gold += share * sum(gold[i] for i in order[start:end]) / (end - start)
        start = end
    return by_proxy, by_gold
