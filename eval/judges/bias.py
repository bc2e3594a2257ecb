"""Faults of a judge, from its verdicts: position bias, length bias, and disagreement of votes and of judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from align.eval.judges.grading import Grade, ModelAnswers, Pair
from align.eval.statistics.intervals import Interval, mean_interval


@dataclass(frozen=True)
class PositionBias:
    """Effect of the order in which two answers are shown.

    first: share of verdicts for the answer shown first, without ties. Each pair is shown in both orders, so it is 0.5
        for a judge without this bias.
    inconsistent: share of votes on a pair that prefer the same position in both orders.
    verdicts: number of verdicts that are not ties. None instead of an interval if there are none.
    """

    first: Interval | None
    inconsistent: Interval | None
    verdicts: int

    @property
    def preferred(self) -> str | None:
        """`first` or `second` if the interval excludes 0.5, otherwise None."""
        if self.first is None or not (self.first.low > 0.5 or self.first.high < 0.5):
            return None
        return "first" if self.first.low > 0.5 else "second"


@dataclass(frozen=True)
class Agreement:
    """Agreement of two judges on the same pairs.

    same: share of pairs with the same result; None without a pair that both have judged.
    kappa: agreement beyond chance (Cohen 1960); None if chance alone gives full agreement.
    n: pairs that both have judged. left_out: other pairs.
    """

    same: Interval | None
    kappa: float | None
    n: int
    left_out: int


def position_bias(pairs: Sequence[Pair]) -> PositionBias:
    """Position bias over the votes that have a verdict in both orders."""
    both = [
        (pair.question.id, forward, backward)
        for pair in pairs
        for forward, backward in zip(pair.forward, pair.backward, strict=True)
        if forward is not None and backward is not None
    ]
    decided = [(name, choice == "first") for name, *choices in both for choice in choices if choice != "tie"]
    inconsistent = [(name, forward == backward != "tie") for name, forward, backward in both]
    return PositionBias(_share(decided), _share(inconsistent), len(decided))


def length_bias(pairs: Sequence[Pair], first: ModelAnswers, second: ModelAnswers) -> Interval | None:
    """Share of decided pairs that the longer answer wins, in characters; None if there are none.

    A share above 0.5 alone does not show a bias: longer answers may be better. Compare it with a share by people.
    """
    longer = []
    for pair in pairs:
        lengths = [len(answers[pair.question.id][pair.turn]) for answers in (first, second)] if pair.forward else [0, 0]
        if pair.result in (0.0, 1.0) and lengths[0] != lengths[1]:
            longer.append((pair.question.id, (pair.result == 1) == (lengths[0] > lengths[1])))
    return _share(longer)


def vote_agreement(units: Sequence[Grade | Pair]) -> Interval | None:
    """Share of equal votes among all pairs of votes on the same material; None with fewer than two votes."""
    shares, names = [], []
    for unit in units:
        for votes in [unit.votes] if isinstance(unit, Grade) else [unit.forward, unit.backward]:
            equal = [a == b for a, b in combinations([vote for vote in votes if vote is not None], 2)]
            if equal:
                shares.append(sum(equal) / len(equal))
                names.append(unit.question.id)
    return mean_interval(shares, clusters=names) if shares else None


def judge_agreement(first: Sequence[Pair], second: Sequence[Pair]) -> Agreement:
    """Agreement of two judges that compared the same answers in the same order of models."""
    results = {(pair.question.id, pair.turn): pair.result for pair in second}
    both = [
        (pair.question.id, pair.result, other)
        for pair in first
        if pair.result is not None and (other := results.get((pair.question.id, pair.turn))) is not None
    ]
    total = len({(pair.question.id, pair.turn) for pair in [*first, *second]})
    if not both:
        return Agreement(None, None, 0, total)
    same = _share([(name, a == b) for name, a, b in both])
    assert same is not None
    chance = (
        sum(sum(a == value for _, a, _ in both) * sum(b == value for _, _, b in both) for value in (0.0, 0.5, 1.0))
        / len(both) ** 2
    )
    kappa = None if chance == 1 else (same.mean - chance) / (1 - chance)
    return Agreement(same, kappa, len(both), total - len(both))


@dataclass(frozen=True)
class GradeAgreement:
    """Agreement of two judges on the grades of the same answers.

    close: share of answers whose two grades differ by at most 1. difference: mean of the first judge's grade minus the
    second's. n: answers that both have graded. None instead of an interval if there are none.
    """

    close: Interval | None
    difference: Interval | None
    n: int


def grade_agreement(first: Sequence[Grade], second: Sequence[Grade]) -> GradeAgreement:
    """Agreement of two judges that graded the same answers."""
    values = {(grade.question.id, grade.turn): grade.value for grade in second}
    both = [
        (grade.question.id, grade.value - other)
        for grade in first
        if grade.value is not None and (other := values.get((grade.question.id, grade.turn))) is not None
    ]
    if not both:
        return GradeAgreement(None, None, 0)
    difference = mean_interval([value for _, value in both], clusters=[name for name, _ in both])
    return GradeAgreement(_share([(name, abs(value) <= 1) for name, value in both]), difference, len(both))


def _share(found: Sequence[tuple[str, bool]]) -> Interval | None:
    """Share of true values with its interval; the values of a question are one cluster."""
    if not found:
        return None
    return mean_interval([float(value) for _, value in found], clusters=[name for name, _ in found])
