"""Sentences about a judge's results, for a terminal and for a report."""

from __future__ import annotations

from align.eval.judges.bias import Agreement, PositionBias, length_bias, position_bias, vote_agreement
from align.eval.judges.grading import Comparing, Grading, ModelAnswers, Problems
from align.eval.statistics.intervals import Interval
from align.eval.statistics.summary import Summary


def grading_lines(model: str, grading: Grading) -> list[str]:
    """Mean grade, by turn and category, and everything that qualifies it."""
    lines = [f"{model}: mean grade {_mean(grading.summary())}"]
    turns = sorted({g.turn for g in grading.grades})
    if len(turns) > 1:
        lines += [f"  turn {turn + 1}: {_mean(grading.summary(turn=turn))}" for turn in turns]
    categories = dict.fromkeys(g.question.category for g in grading.grades if g.question.category)
    lines += [f"  {category}: {_mean(grading.summary(category=category))}" for category in categories]
    if (same := vote_agreement(grading.grades)) is not None:
        lines.append(f"  votes on one answer are equal in {_percent(same)}")
    return lines + _problem_lines(grading.problems, grading.stopped)


def comparing_lines(
    first: str, second: str, comparing: Comparing, first_answers: ModelAnswers, second_answers: ModelAnswers
) -> list[str]:
    """Win rate of the first model, by category, and everything that qualifies it: biases, votes, problems."""
    counts = f"{comparing.wins} wins, {comparing.ties} ties, {comparing.losses} losses"
    lines = [f"{first} against {second}: win rate {_mean(comparing.summary())}: {counts}"]
    categories = dict.fromkeys(p.question.category for p in comparing.pairs if p.question.category)
    lines += [f"  {category}: {_mean(comparing.summary(category=category))}" for category in categories]
    lines += [f"  {line}" for line in bias_lines(position_bias(comparing.pairs))]
    if (longer := length_bias(comparing.pairs, first_answers, second_answers)) is not None:
        lines.append(f"  the longer answer wins in {_percent(longer)} of the pairs with a winner")
    if (same := vote_agreement(comparing.pairs)) is not None:
        lines.append(f"  votes on one order are equal in {_percent(same)}")
    return lines + _problem_lines(comparing.problems, comparing.stopped)


def bias_lines(bias: PositionBias) -> list[str]:
    """Position bias; the first line begins with `POSITION BIAS` if it is significant."""
    if bias.first is None or bias.inconsistent is None:
        return []
    line = f"the answer shown first is preferred in {_percent(bias.first)} of {bias.verdicts} verdicts"
    if bias.preferred is not None:
        line = f"POSITION BIAS: the judge prefers the answer shown {bias.preferred}; {line}"
    return [line, f"the order decides {_percent(bias.inconsistent)} of the votes; such votes count as ties"]


def agreement_line(first: str, second: str, agreement: Agreement) -> str:
    """How often two judges agree."""
    if agreement.same is None:
        return f"{first} and {second} have judged no pair in common"
    kappa = "" if agreement.kappa is None else f", kappa {agreement.kappa:.2f}"
    left_out = f"; {agreement.left_out} pairs without a result of both" if agreement.left_out else ""
    return f"{first} and {second} agree on {_percent(agreement.same)} of {agreement.n} pairs{kappa}{left_out}"


def _mean(summary: Summary) -> str:
    if summary.mean is None:
        return f"unknown (n 0, {summary.unscored} unscored)"
    interval = "" if summary.low is None else f" [{summary.low:.2f}, {summary.high:.2f}]"
    return f"{summary.mean:.2f}{interval} (n {summary.n}, {summary.unscored} unscored)"


def _percent(interval: Interval) -> str:
    ends = "" if interval.low != interval.low else f" [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
    return f"{100 * interval.mean:.0f}{ends} %"


def _problem_lines(problems: Problems, stopped: str) -> list[str]:
    names = ("failed", "unparsable", "not_asked", "no_answer")
    texts = ("failed calls", "verdicts that cannot be read", "calls not made", "answers missing")
    counts = [f"{count} {text}" for name, text in zip(names, texts) if (count := getattr(problems, name))]
    lines = [f"  unscored: {', '.join(counts)}"] if counts else []
    lines += [f"    for example {example}" for example in problems.examples]
    if stopped:
        lines.append(f"  stopped at {stopped}; raise it and run again to make the other calls")
    return lines
