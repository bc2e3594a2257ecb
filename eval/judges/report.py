"""Sentences about a judge's results, for a terminal and for a report."""

from __future__ import annotations

from align.eval.judges.bias import (
    Agreement,
    GradeAgreement,
    PositionBias,
    length_bias,
    position_bias,
    vote_agreement,
)
from align.eval.judges.grading import Comparing, Grading, ModelAnswers, Problems
from align.eval.statistics.text import interval_text, percent_text, summary_text


def grading_lines(model: str, grading: Grading) -> list[str]:
    """Mean grade, by turn and category, and everything that qualifies it."""
    lines = [f"{model}: mean grade {summary_text(grading.summary(), 2)}"]
    turns = sorted({g.turn for g in grading.grades})
    if len(turns) > 1:
        lines += [f"  turn {turn + 1}: {summary_text(grading.summary(turn=turn), 2)}" for turn in turns]
    categories = dict.fromkeys(g.question.category for g in grading.grades if g.question.category)
    lines += [f"  {category}: {summary_text(grading.summary(category=category), 2)}" for category in categories]
    return [*lines, *(f"  {note}" for note in grading_notes(grading))]


def grading_notes(grading: Grading) -> list[str]:
    """Notes on the grades: agreement of votes, missing verdicts."""
    notes = []
    if (same := vote_agreement(grading.grades)) is not None:
        notes.append(f"votes on one answer are equal in {percent_text(same)}")
    return notes + problem_notes(grading.problems, grading.stopped)


def comparing_lines(
    first: str, second: str, comparing: Comparing, first_answers: ModelAnswers, second_answers: ModelAnswers
) -> list[str]:
    """Win rate of the first model, by category, and everything that qualifies it: biases, votes, problems."""
    counts = f"{comparing.wins} wins, {comparing.ties} ties, {comparing.losses} losses"
    lines = [f"{first} against {second}: win rate {summary_text(comparing.summary(), 2)}: {counts}"]
    categories = dict.fromkeys(p.question.category for p in comparing.pairs if p.question.category)
    lines += [f"  {category}: {summary_text(comparing.summary(category=category), 2)}" for category in categories]
    notes = comparing_notes(comparing, first_answers, second_answers)
    return [*lines, *(f"  {note}" for note in notes)]


def comparing_notes(comparing: Comparing, first_answers: ModelAnswers, second_answers: ModelAnswers) -> list[str]:
    """Notes on the win rate: biases, agreement of votes, missing verdicts."""
    notes = bias_lines(position_bias(comparing.pairs))
    if (longer := length_bias(comparing.pairs, first_answers, second_answers)) is not None:
        notes.append(f"the longer answer wins in {percent_text(longer)} of the pairs with a winner")
    if (same := vote_agreement(comparing.pairs)) is not None:
        notes.append(f"votes on one order are equal in {percent_text(same)}")
    return notes + problem_notes(comparing.problems, comparing.stopped)


def bias_lines(bias: PositionBias) -> list[str]:
    """Position bias; the first line begins with `POSITION BIAS` if it is significant."""
    if bias.first is None or bias.inconsistent is None:
        return []
    line = f"the answer shown first is preferred in {percent_text(bias.first)} of {bias.verdicts} verdicts"
    if bias.preferred is not None:
        line = f"POSITION BIAS: the judge prefers the answer shown {bias.preferred}; {line}"
    return [line, f"the order decides {percent_text(bias.inconsistent)} of the votes; such votes count as ties"]


def agreement_line(first: str, second: str, agreement: Agreement) -> str:
    """A sentence on the agreement of two judges' votes."""
    if agreement.same is None:
        return f"{first} and {second} have judged no pair in common"
    kappa = "" if agreement.kappa is None else f", kappa {agreement.kappa:.2f}"
    left_out = f"; {agreement.left_out} pairs without a result of both" if agreement.left_out else ""
    return f"{first} and {second} agree on {percent_text(agreement.same)} of {agreement.n} pairs{kappa}{left_out}"


def grade_agreement_line(first: str, second: str, agreement: GradeAgreement) -> str:
    """A sentence on the agreement of two judges' grades."""
    if agreement.close is None or agreement.difference is None:
        return f"{first} and {second} have graded no answer in common"
    close = f"{percent_text(agreement.close)} of {agreement.n} answers"
    return (
        f"grades of {first} and {second} differ by at most 1 for {close}; {first} minus {second} is "
        f"{interval_text(agreement.difference)} in the mean"
    )


def problem_notes(problems: Problems, stopped: str) -> list[str]:
    """Counts of missing verdicts, with examples, and the limit that was reached."""
    names = ("failed", "unparsable", "not_asked", "no_answer")
    texts = ("failed calls", "verdicts that cannot be read", "calls not made", "answers missing")
    counts = [f"{count} {text}" for name, text in zip(names, texts) if (count := getattr(problems, name))]
    notes = [f"unscored: {', '.join(counts)}"] if counts else []
    notes += [f"for example {example}" for example in problems.examples]
    if stopped:
        notes.append(f"stopped at {stopped}; raise it and run again to make the other calls")
    return notes
