"""`align eval` with judges and judged tasks."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import yaml

from align.reward.json_http import JsonServer

from .here import Here, wrong

URL = "http://127.0.0.1:8000/v1"
ROW = {"n": 1, "prompt": "Why?", "answer": "So."}
TASK: dict[str, Any] = {"kind": "judged", "name": "mine", "data": "questions.jsonl"}
COMPARE: dict[str, Any] = {"mode": "compare", "baseline": {"name": "theirs", "answer": "answer"}}


def judged(
    here: Here, *rows: dict[str, Any], judges: tuple[str, ...] = (URL,), models: tuple[str, ...] = ("m",), **task: Any
) -> str:
    """Evaluate a task with judges at a server with some models."""
    here.write("questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows or [ROW]))
    here.write("mine.yaml", yaml.safe_dump(TASK | task))
    flags = [flag for judge in judges for flag in ("--judge", judge)]
    served = {"data": [{"id": name} for name in models]}
    with patch.object(JsonServer, "request", lambda *args: (200, served)):
        return here.align("eval", "model", "--tasks", "mine.yaml", *flags)


@wrong("eval-judge-none", "A judged task without a judge")
def _(here: Here) -> str:
    return judged(here, judges=())


@wrong("eval-judge-unknown", "A judge that is neither a URL nor a file nor a folder")
def _(here: Here) -> str:
    return judged(here, judges=("127.0.0.1:8000",))


@wrong("eval-judge-twice", "Two judges with the same name")
def _(here: Here) -> str:
    return judged(here, judges=(URL, URL))


@wrong("eval-judge-models", "A judge's server with several models")
def _(here: Here) -> str:
    return judged(here, models=("small", "large"))


@wrong("eval-judge-down", "A judge's server that does not respond", r"(?<=response ).+(?=\. Start)")
def _(here: Here) -> str:
    here.write("mine.yaml", yaml.safe_dump(TASK))
    return here.align("eval", "model", "--tasks", "mine.yaml", "--judge", "http://127.0.0.1:9/v1")


@wrong("eval-judge-key", "A judge's file with an unknown key")
def _(here: Here) -> str:
    here.write("judge.yaml", f"url: {URL}\nmodel: m\nvote: 3\n")
    return judged(here, judges=("judge.yaml",))


@wrong("judged-question", "A judged task whose rows have no question")
def _(here: Here) -> str:
    return judged(here, {"text": "Why?"})


@wrong("judged-id-missing", "A judged task with a row without an id")
def _(here: Here) -> str:
    return judged(here, ROW, {"prompt": "How?"}, id="n")


@wrong("judged-id-twice", "A judged task with two rows of the same id")
def _(here: Here) -> str:
    return judged(here, ROW, ROW, id="n")


@wrong("judged-baseline", "A judged task without a baseline to compare with")
def _(here: Here) -> str:
    return judged(here, mode="compare")


@wrong("judged-baseline-id", "A baseline in another file, without an id")
def _(here: Here) -> str:
    return judged(here, mode="compare", baseline={"name": "theirs", "answer": "answer", "data": "answers.jsonl"})


@wrong("judged-baseline-answer", "A baseline without an answer to a question")
def _(here: Here) -> str:
    return judged(here, ROW, {"prompt": "How?"}, **COMPARE)
