"""Questions and baseline answers in the formats of the published benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.config.judged_task import Baseline, JudgedTask
from align.errors import UserError
from align.eval.judges.prompts import Question
from align.reward.text import Row, is_missing, spellings

QUESTION_COLUMNS = ("turns", "prompt", "instruction", "question")


def texts(value: Any, role: str) -> tuple[str, ...]:
    """The texts of one role: of a text, of a list of texts or of `{content: TEXT}`, or of a conversation.

    An answer of several `choices` is the first one. A message's content may be a mapping with the key `answer`.
    """
    if is_missing(value):
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        for key in ("content", "answer", "turns"):
            if key in value:
                return texts(value[key], role)
        return ()
    if isinstance(value, Sequence):
        parts = [part for part in value if not isinstance(part, Mapping) or part.get("role", role) == role]
        if parts and isinstance(parts[0], Mapping) and "turns" in parts[0]:
            return texts(parts[0]["turns"], role)
        return tuple(text for part in parts for text in texts(part, role))
    return (spellings(value)[0],)


def read_questions(task: JudgedTask, rows: Sequence[Row], where: str) -> list[Question]:
    """The questions of the rows. where: the task's file, for messages."""
    found = []
    for number, row in enumerate(rows):
        columns = QUESTION_COLUMNS if task.question is None else (task.question,)
        turns = next((said for column in columns if (said := texts(row.get(column), "user"))), ())
        if not turns:
            raise UserError(
                f"{where}: row {number + 1} has no question in {' or '.join(columns)}; it has {', '.join(row)}. Set "
                "`question` to a column."
            )
        references = texts(row.get(task.reference), "assistant") if task.reference else ()
        category = row.get(task.category) if task.category else None
        name = "" if is_missing(category) else str(category)
        found.append(Question(_id(row, task.id, number, where), turns, references, name))
    ids = [question.id for question in found]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"{where}: two rows have the id {twice}. Set `id` to a column whose values differ.")
    return found


def read_baseline(
    baseline: Baseline, rows: Sequence[Row], key: str | None, questions: Sequence[Question], where: str
) -> dict[str, tuple[str, ...]]:
    """Answers of the baseline by the question's id. key: column of the id."""
    answers = {_id(row, key, n, where): texts(row.get(baseline.answer), "assistant") for n, row in enumerate(rows)}
    missing = [question.id for question in questions if len(answers.get(question.id, ())) < len(question.turns)]
    if missing:
        raise UserError(
            f"{where}: {baseline.name} has no answer to {len(missing)} of {len(questions)} questions, the first with "
            f"the id {missing[0]}. Correct baseline.answer, or remove the questions."
        )
    return answers


def _id(row: Row, column: str | None, number: int, where: str) -> str:
    if column is None:
        return str(number)
    if is_missing(row.get(column)):
        raise UserError(f"{where}: row {number + 1} has no value in the column '{column}'. Correct `id`.")
    return spellings(row[column])[0]
