"""Tasks whose answers a judge grades, or compares with those of another model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.config.evaluation import TASK_NAME
from align.config.own_task import TaskData
from align.config.section import Positive, Section

Column = Annotated[str, Field(min_length=1)]


class Baseline(Section):
    """Answers of the model that others are compared with."""

    name: Annotated[str, Field(min_length=1)]
    """Name of the model in the results."""
    data: TaskData | None = None
    """Rows with the answers. Default: the rows of the questions."""
    answer: Column
    """Column of the answers: a text, a list with one for each turn, or a conversation."""
    id: Column | None = None
    """Column of `data` with the question's id. Default: the task's `id`."""

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class JudgedTask(Section):
    """Questions whose answers are judged."""

    kind: Literal["judged"]
    """Tells a file with this task from other tasks."""
    name: Annotated[str, Field(pattern=TASK_NAME)]
    """Name in results and report."""
    version: str = "1"
    """Change it when the numbers are no longer comparable with earlier ones."""
    data: TaskData
    """The questions. A path alone may be written as text."""
    mode: Literal["grade", "compare"] = "grade"
    """grade: the judge grades each answer from 1 to 10; a reward model scores it. compare: the judge says whether an
    answer or the baseline's is better, in both orders."""
    question: Column | None = None
    """Column of the question: a text, a list with the user's message of each turn, or a conversation. Default: the
    first of `turns`, `prompt`, `instruction` and `question` that a row has."""
    id: Column | None = None
    """Column of the question's id. Default: the number of its row."""
    reference: Column | None = None
    """Column of a right answer: a text or a list with one for each turn. It is shown to the judge."""
    category: Column | None = None
    """Column of the category, for results by category."""
    baseline: Baseline | None = None
    """Answers to compare with, for `mode: compare`."""
    system: str | None = None
    """System prompt of the model under evaluation."""
    max_new_tokens: Positive = 1024
    """Maximum number of tokens of an answer."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> JudgedTask:
        if (self.mode == "compare") != (self.baseline is not None):
            raise ValueError("mode: compare and baseline belong together; set both, or neither")
        if self.baseline is not None and self.baseline.data is not None and not (self.baseline.id or self.id):
            raise ValueError("the baseline's rows are found by their id; set id")
        return self
