"""Judges of answers."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from align.config.judges import Judge
from align.eval.judges.calls import JudgeClient
from align.eval.judges.grading import grade
from align.eval.judges.prompts import Question
from align.reward.json_http import JsonServer

from .here import Here, wrong


def judge(here: Here, status: int, *, path: str = "calls.jsonl", **settings: Any) -> None:
    """Grade two answers with a judge whose server answers each call with a status."""
    settings = {"url": "http://127.0.0.1:8000/v1", "model": "judge", "retries": 0, "workers": 1} | settings
    section = Judge.model_validate(settings)
    questions = [Question(f"q{number}", (f"Why {number}?",)) for number in range(6)]
    with patch.object(JsonServer, "request", lambda *args: (status, {"error": {"message": "no such model"}})):
        client = JudgeClient(section)
        grade(
            questions,
            {question.id: ("So.",) for question in questions},
            section,
            lambda messages, vote: client.ask(messages, seed=vote),
            here.folder / path,
        )


@wrong("judge-key", "A judge whose API key is not set")
def _(here: Here) -> None:
    judge(here, 200, key="NO_SUCH_KEY")


@wrong("judge-refused", "A judge's server does not have the model")
def _(here: Here) -> None:
    judge(here, 404)


@wrong("judge-silent", "No call of a judge succeeds")
def _(here: Here) -> None:
    judge(here, 500)


@wrong("judge-calls", "A file with a judge's calls that is not one")
def _(here: Here) -> None:
    here.write("calls.jsonl", '{"text": "Grade: 7"}\n')
    judge(here, 200)
