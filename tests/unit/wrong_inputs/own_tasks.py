"""Tasks of the user in YAML."""

from __future__ import annotations

from pathlib import Path

from align.data.tokenizer import train_tokenizer
from align.eval.encoder import Encoder
from align.eval.own_task import YamlTask
from align.eval.records import Place, Record

from .here import Here, wrong

TASK = """name: sums
data: sums.jsonl
prompt: "{{ q }}"
verifier: {kind: math, column: a}
"""
CHOICES = TASK.replace("verifier: {kind: math, column: a}", "choices: options\nanswer: a")


def requests(here: Here, text: str, *, data: Path | None = None, shots: int | None = None) -> YamlTask:
    """The task of a YAML text, after it has made its requests."""
    here.write("sums.jsonl", '{"q": "1 + 1?", "a": "3", "options": ["1", "2"]}\n')
    here.write("task.yaml", text)
    task = YamlTask(here.folder / "task.yaml", data=data, shots=shots)
    list(task.requests(task.documents(), Encoder(train_tokenizer(["a"], 259), 64)))
    return task


@wrong("own-task-key", "A task in YAML with an unknown key")
def _(here: Here) -> None:
    requests(here, TASK.replace("prompt:", "promt:"))


@wrong("own-task-both", "A task in YAML with choices and a verifier")
def _(here: Here) -> None:
    requests(here, TASK + "choices: options\nanswer: a\n")


@wrong("own-task-mapping", "A task in YAML that is a list")
def _(here: Here) -> None:
    requests(here, "- sums\n")


@wrong("own-task-column", "A template with a column that the rows do not have")
def _(here: Here) -> None:
    requests(here, TASK.replace("{{ q }}", "{{ question }}"))


@wrong("own-task-template", "A template that is not valid")
def _(here: Here) -> None:
    requests(here, TASK.replace("{{ q }}", "{{ q"))


@wrong("own-task-expression", "An expression of choices that is not valid")
def _(here: Here) -> None:
    requests(here, CHOICES.replace("options", "'[options'"))


@wrong("own-task-choices", "Choices that are not a list")
def _(here: Here) -> None:
    requests(here, CHOICES.replace("options", "q"))


@wrong("own-task-answer", "An answer that is not one of the choices")
def _(here: Here) -> None:
    task = requests(here, CHOICES)
    scored = [Record("sums", task.version, Place("0", number), "scored", 2, logprobs=(-1.0,)) for number in range(2)]
    task.score(scored)


@wrong("own-task-data", "A task on a data set, without --data")
def _(here: Here) -> None:
    requests(here, TASK.replace("sums.jsonl", "DATA/owner/sums"))


@wrong("own-task-empty", "A task whose file has no rows")
def _(here: Here) -> None:
    here.write("none.jsonl", "")
    requests(here, TASK.replace("sums.jsonl", "none.jsonl"))


@wrong("own-task-shots", "More examples than rows")
def _(here: Here) -> None:
    requests(here, TASK + 'shots: {count: 5, answer: "{{ a }}"}\n')


@wrong("own-task-no-shots", "Examples for a task that defines none")
def _(here: Here) -> None:
    requests(here, TASK, shots=5)


@wrong("own-task-pass-at", "pass@k with fewer samples than k")
def _(here: Here) -> None:
    task = requests(here, TASK + "pass_at: [4]\n")
    task.score([Record("sums", task.version, Place("0"), "finished", text="3")])
