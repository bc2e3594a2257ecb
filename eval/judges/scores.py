"""Grades and comparisons by a reward model. It sees one answer at a time, so it has no position bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from align.eval.judges.ask import Spent
from align.eval.judges.grading import EXAMPLES, Comparing, Grade, Grading, ModelAnswers, Pair, Problems
from align.eval.judges.prompts import Choice, Question

Messages = list[dict[str, str]]
Scores = Callable[[list[Messages], list[str]], Sequence[float | None]]
"""f(conversations, answers) -> score of each answer; None or NaN for an answer without a score."""


def grade_by_scores(questions: Sequence[Question], answers: ModelAnswers, score: Scores) -> Grading:
    """The score of each answer as its grade."""
    values, problems = _scores(questions, answers, score)
    grades = [Grade(q, turn, (values.get((q.id, turn)),)) for q in questions for turn in range(len(q.turns))]
    return Grading(grades, problems, Spent(), "")


def compare_by_scores(
    questions: Sequence[Question], first: ModelAnswers, second: ModelAnswers, score: Scores
) -> Comparing:
    """The answer with the higher score wins; equal scores are a tie."""
    (left, one), (right, two) = (_scores(questions, answers, score) for answers in (first, second))
    pairs = []
    for question in questions:
        for turn in range(len(question.turns)):
            choice = _higher(left.get((question.id, turn)), right.get((question.id, turn)))
            pairs.append(Pair(question, turn, (choice,), (_MIRRORED.get(choice),)))
    examples = (one.examples + two.examples)[:EXAMPLES]
    problems = Problems(one.failed + two.failed, 0, 0, one.no_answer + two.no_answer, examples)
    return Comparing(pairs, problems, Spent(), "")


_MIRRORED: dict[Choice | None, Choice] = {"first": "second", "second": "first", "tie": "tie"}


def _higher(left: float | None, right: float | None) -> Choice | None:
    if left is None or right is None:
        return None
    return "tie" if left == right else "first" if left > right else "second"


def _scores(
    questions: Sequence[Question], answers: ModelAnswers, score: Scores
) -> tuple[dict[tuple[str, int], float], Problems]:
    """Finite score of each answer, by question and turn, and counts of the others."""
    places = [(q, turn) for q in questions for turn in range(len(q.turns))]
    given = [(q, turn) for q, turn in places if len(answers.get(q.id, ())) > turn]
    conversations = [_conversation(q, answers[q.id], turn) for q, turn in given]
    scores = score(conversations, [answers[q.id][turn] for q, turn in given]) if given else []
    found, missing = {}, []
    for (question, turn), value in zip(given, scores, strict=True):
        if value is None or not math.isfinite(value):
            missing.append(f"{question.id}: the reward model gave no finite score")
        else:
            found[question.id, turn] = float(value)
    return found, Problems(len(missing), 0, 0, len(places) - len(given), tuple(missing[:EXAMPLES]))


def _conversation(question: Question, answers: Sequence[str], turn: int) -> Messages:
    """Messages up to the user's message of `turn`."""
    messages: Messages = []
    for asked, answer in zip(question.turns[:turn], answers, strict=False):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question.turns[turn]}]
