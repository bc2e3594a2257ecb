"""Tasks of the user in YAML: data, prompt, and either choices or a verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from align.config.evaluation import TASK_NAME, F1Metric
from align.config.load import read_yaml
from align.config.rewards import ModelReward, RemoteReward, Reward
from align.config.section import Positive, Section
from align.errors import UserError

Verifier = Annotated[F1Metric | Reward, Field(discriminator="kind")]
T = TypeVar("T", bound=Section)
DATA = "DATA/"
"""Beginning of a path in the folder of `--data`."""


class TaskData(Section):
    """Rows of a task."""

    path: str
    """File, folder or pattern, as in a recipe's data sources; relative to the task's file. `DATA/owner/name` is the
    data set `owner/name` in the folder of `--data`."""
    name: str | None = None
    """Configuration of a data set that has several."""
    split: str | list[str] | None = None
    """Split of a folder that has several."""
    download: str | None = None
    """Command that downloads a data set that is missing, with `{folder}` for its folder. Default: `hf download`."""


class Shots(Section):
    """Examples before the question."""

    count: Positive
    """Number of examples, the same for every document."""
    answer: str
    """Template of an example's answer, which follows its prompt."""
    data: TaskData | None = None
    """Rows of the examples. Default: rows of the task's own data, which are then not evaluated."""
    seed: int | None = None
    """Draw the examples with this seed. Default: the first rows."""


class OwnTask(Section):
    """A task. Texts in `prompt`, `answer` and the like are Jinja templates of the row's columns."""

    name: Annotated[str, Field(pattern=TASK_NAME)]
    """Name in results and report."""
    version: str = "1"
    """Change it when the numbers are no longer comparable with earlier ones."""
    data: TaskData
    """The documents. A path alone may be written as text."""
    prompt: str
    """Template of the prompt; with `--chat`, of the user's message."""
    chat_prompt: str | None = None
    """Template of the user's message with `--chat`. Default: `prompt`."""
    opening: str = ""
    """Template of the beginning of the answer, which the model continues. It is not a part of the completion."""
    system: str | None = None
    """System prompt with `--chat`."""
    choices: str | list[str] | None = None
    """The continuations whose log-probabilities are compared: a Jinja expression with a list, for example `options` or
    `[a, b]`, or a list of templates."""
    answer: str | None = None
    """Jinja expression of the right choice: its number from 0, its letter, or its text."""
    verifier: Verifier | None = None
    """Score of a completion by any kind of verifier or function in docs/rewards.md."""
    shots: Shots | None = None
    """Examples before the question."""
    separator: str = "\n\n"
    """Text between examples, without `--chat`."""
    delimiter: str = " "
    """Text between a prompt and an answer or a choice, without `--chat`."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Texts that end a completion, without `--chat`."""
    max_new_tokens: Positive = 256
    """Maximum number of tokens of a completion."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    metric: Annotated[str, Field(min_length=1)] | None = None
    """Name of the metric. Default: `acc` for choices, otherwise the verifier's kind."""
    pass_at: list[Positive] = Field(default_factory=list)
    """Also report pass@k, estimated without bias from the samples of each document (`--samples`)."""

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> OwnTask:
        if (self.choices is None) == (self.verifier is None):
            raise ValueError("a task has either choices or a verifier; set one of the two")
        if (self.choices is None) != (self.answer is None):
            raise ValueError("choices and answer belong together; set both, or neither")
        if isinstance(self.verifier, ModelReward | RemoteReward):
            raise ValueError(f"a verifier cannot be of kind '{self.verifier.kind}'; use a judge, or kind: function")
        if self.pass_at and self.verifier is None:
            raise ValueError("pass_at needs completions; set a verifier instead of choices")
        return self


def read_own_task(file: Path) -> OwnTask:
    """The task of a YAML file. Raises `UserError` with file and line for the first thing that is wrong."""
    return read_task(file, OwnTask, "a task; write a mapping with the keys name, data and prompt")


def read_task(file: Path, kind: type[T], wanted: str, noun: str = "task") -> T:
    """The section of a YAML file. wanted: what the file should be, and the fix. noun: what the file is."""
    values = read_yaml(file, wanted)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
    # A key with a typing error is named before the key that is missing for that reason.
    problem = next((found for found in problems if found["type"] == "extra_forbidden"), problems[0])
    place = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    text = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        text = "the key is unknown"
    if problem["type"] == "missing":
        text = "the key is missing"
    key = ".".join(str(part) for part in place if part not in _KINDS)
    raise UserError(f"{file}, line {_line(file, place)}: {key + ': ' if key else ''}{text}. Correct the {noun}.")


_KINDS = {"f1", "math", "exact", "regex", "format", "length", "choice", "json", "overlap", "ifeval", "code", "function"}
"""Names that pydantic puts into the place of a problem inside a verifier."""


def _line(file: Path, place: list[Any]) -> int:
    """Line of the innermost part of a place that is written in the file."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = node.start_mark.line + 1 if node is not None else 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                continue
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
