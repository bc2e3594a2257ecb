"""Grades and comparisons from a judge's verdicts. A missing verdict is unscored, never 0 or a loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from align.config.judges import Judge
from align.eval.judges.ask import Answers, Call, Spent, ask_all
from align.eval.judges.calls import Reply
from align.eval.judges.prompts import Choice, Question, compare_prompt, grade_prompt, read_choice, read_grade
from align.eval.statistics.summary import Summary, summarize

Ask = Callable[[Sequence[dict[str, str]], int], Reply]
ModelAnswers = Mapping[str, Sequence[str]]
"""Answers of a model: by the question's id, one for each turn."""
EXAMPLES = 3
"""Number of problems that are shown."""


@dataclass(frozen=True)
class Problems:
    """Verdicts that are missing.

    failed: calls without a reply.
    unparsable: replies without a verdict.
    not_asked: calls that the budget did not allow.
    no_answer: answers that a model did not give.
    examples: some of the problems, with the question's id.
    """

    failed: int
    unparsable: int
    not_asked: int
    no_answer: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Grade:
    """Grades of one answer.

    votes: one for each vote; None if it is missing.
    said: for each vote the judge's text, or why there is none.
    """

    question: Question
    turn: int
    votes: tuple[float | None, ...]
    said: tuple[str, ...] = ()

    @property
    def value(self) -> float | None:
        """Mean of the existing votes; None without any."""
        found = [vote for vote in self.votes if vote is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Pair:
    """Verdicts on two answers to one question.

    forward: votes when the first model's answer is shown first. backward: votes when it is shown second.
    said: for each vote, forward and then backward, the judge's text, or why there is none.
    """

    question: Question
    turn: int
    forward: tuple[Choice | None, ...]
    backward: tuple[Choice | None, ...]
    said: tuple[str, ...] = ()

    @property
    def result(self) -> float | None:
        """1 if the first model wins, 0 if the second wins, 0.5 for a tie; None without a verdict in each order.

        Both orders are one observation: a model wins if the majority of votes prefers it in both; otherwise it is a
        tie.
        """
        forward, backward = majority(self.forward), majority(self.backward)
        if forward is None or backward is None:
            return None
        if forward == "first" and backward == "second":
            return 1.0
        return 0.0 if forward == "second" and backward == "first" else 0.5


@dataclass(frozen=True)
class Grading:
    """Grades of one model's answers."""

    grades: list[Grade]
    problems: Problems
    spent: Spent
    stopped: str

    def summary(self, *, turn: int | None = None, category: str | None = None) -> Summary:
        """Mean grade with its interval; a question's turns are one cluster."""
        chosen = [g for g in self.grades if turn in (None, g.turn) and category in (None, g.question.category)]
        return _summary([g.value for g in chosen], [g.question.id for g in chosen])


@dataclass(frozen=True)
class Comparing:
    """Comparisons of two models' answers."""

    pairs: list[Pair]
    problems: Problems
    spent: Spent
    stopped: str

    @property
    def wins(self) -> int:
        return sum(pair.result == 1 for pair in self.pairs)

    @property
    def ties(self) -> int:
        return sum(pair.result == 0.5 for pair in self.pairs)

    @property
    def losses(self) -> int:
        return sum(pair.result == 0 for pair in self.pairs)

    def summary(self, *, turn: int | None = None, category: str | None = None) -> Summary:
        """Win rate of the first model with its interval; a tie counts 0.5, and a question's turns are one cluster."""
        chosen = [p for p in self.pairs if turn in (None, p.turn) and category in (None, p.question.category)]
        return _summary([p.result for p in chosen], [p.question.id for p in chosen])


def grade(questions: Sequence[Question], answers: ModelAnswers, judge: Judge, ask: Ask, path: Path) -> Grading:
    """Grade each answer of a model. path: file with the calls; see `ask_all`."""
    places = [(q, turn) for q in questions for turn in range(len(q.turns))]
    given = [(q, turn) for q, turn in places if len(answers.get(q.id, ())) > turn]
    calls = [Call(tuple(grade_prompt(q, answers[q.id], turn)), v) for q, turn in given for v in range(judge.votes)]
    found = ask_all(calls, judge, ask, path)
    verdicts, problems = _read(found, read_grade, [q.id for q, _ in given for _ in range(judge.votes)])
    problems = _with_missing(problems, places, given)
    units = zip(_grouped(verdicts, judge.votes), _grouped(_said(found), judge.votes), strict=True)
    votes = dict(zip(((q.id, turn) for q, turn in given), units, strict=True))
    grades = [Grade(q, turn, *votes.get((q.id, turn), ((), ()))) for q, turn in places]
    return Grading(grades, problems, found.spent, found.stopped)


def compare(
    questions: Sequence[Question], first: ModelAnswers, second: ModelAnswers, judge: Judge, ask: Ask, path: Path
) -> Comparing:
    """Compare each answer of two models in both orders. path: file with the calls; see `ask_all`."""
    places = [(q, turn) for q in questions for turn in range(len(q.turns))]
    given = [(q, t) for q, t in places if min(len(first.get(q.id, ())), len(second.get(q.id, ()))) > t]
    calls = [
        Call(tuple(compare_prompt(q, shown[0][q.id], shown[1][q.id], turn)), vote)
        for q, turn in given
        for shown in ((first, second), (second, first))
        for vote in range(judge.votes)
    ]
    found = ask_all(calls, judge, ask, path)
    verdicts, problems = _read(found, read_choice, [q.id for q, _ in given for _ in range(2 * judge.votes)])
    problems = _with_missing(problems, places, given)
    orders = cast("list[tuple[Choice | None, ...]]", _grouped(verdicts, judge.votes))
    said = _grouped(_said(found), 2 * judge.votes)
    votes = {(q.id, turn): (orders[2 * i], orders[2 * i + 1], said[i]) for i, (q, turn) in enumerate(given)}
    pairs = [Pair(q, turn, *votes.get((q.id, turn), ((), (), ()))) for q, turn in places]
    return Comparing(pairs, problems, found.spent, found.stopped)


def majority(votes: Sequence[Choice | None]) -> Choice | None:
    """The most frequent vote, a tie if several are equally frequent, None without a vote."""
    counts = Counter(vote for vote in votes if vote is not None).most_common()
    if not counts:
        return None
    return "tie" if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]


T = TypeVar("T")


def _read(found: Answers, read: Callable[[str], T | None], names: Sequence[str]) -> tuple[list[T | None], Problems]:
    verdicts: list[T | None] = []
    counts, examples = Counter[str](), []
    for reply, name in zip(found.replies, names, strict=True):
        verdict = None if reply is None or reply.text is None else read(reply.text)
        verdicts.append(verdict)
        if verdict is not None:
            continue
        if reply is None:
            counts["not_asked"] += 1
            continue
        counts["failed" if reply.text is None else "unparsable"] += 1
        said = reply.problem or f"no verdict in {(reply.text or '')[-80:]!r}"
        examples.append(f"{name}: {said}")
    problems = Problems(counts["failed"], counts["unparsable"], counts["not_asked"], 0, tuple(examples[:EXAMPLES]))
    return verdicts, problems


def _said(found: Answers) -> list[str]:
    """Text of each reply, or why there is none."""
    return [
        f"the call was not made: {found.stopped} is reached" if reply is None else reply.text or reply.problem
        for reply in found.replies
    ]


def _with_missing(problems: Problems, places: Sequence[object], given: Sequence[object]) -> Problems:
    missing = len(places) - len(given)
    return Problems(problems.failed, problems.unparsable, problems.not_asked, missing, problems.examples)


def _grouped(values: Sequence[T], size: int) -> list[tuple[T, ...]]:
    return [tuple(values[start : start + size]) for start in range(0, len(values), size)]


def _summary(values: Sequence[float | None], questions: Sequence[str]) -> Summary:
    return summarize(values, resamples=2000, seed=0, clusters=questions)
