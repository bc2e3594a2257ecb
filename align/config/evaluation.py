"""Tasks of an evaluate stage, and evaluation during training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from align.config.parts import Source
from align.config.rewards import ModelReward, Reward, RewardBase
from align.config.section import RUNTIME, Location, Positive, Section

TASK_NAME = r"^[a-z0-9][a-z0-9_-]*$"


class F1Metric(RewardBase):
    """Word F1 between the completion and the row's reference text. Rows without a reference text are not scored."""

    kind: Literal["f1"]
    """Selects word F1."""
    column: str = "reference"
    """Column with the reference text, or with a list of texts; the best match counts."""


FOR_REWARDS = ("weight", "normalise", "clip", "failure_score")
"""Reward settings that a metric must not have, because its values are reported unscaled."""


def _plain(metric: RewardBase) -> RewardBase:
    if isinstance(metric, ModelReward):
        raise ValueError(f"metric '{metric.label}' is a reward model; set the stage's reward_model instead")
    for key, field in type(metric).model_fields.items():
        if key in FOR_REWARDS and getattr(metric, key) != field.get_default(call_default_factory=True):
            raise ValueError(f"metric '{metric.label}' sets {key}, which only rewards have; remove {key}")
    return metric


Metric = Annotated[Annotated[F1Metric | Reward, Field(discriminator="kind")], AfterValidator(_plain)]
"""Word F1 or any reward except a reward model."""


def _distinct(metrics: list[Metric]) -> list[Metric]:
    labels = [metric.label for metric in metrics]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{labels.count(label)} metrics are called '{label}'; set a different `name` for each")
    return metrics


class EvaluationTask(Section):
    """A task of an evaluate stage. Omitted settings come from the built-in task of the same name, if any."""

    name: Annotated[str, Field(pattern=TASK_NAME)]
    """Name in results and report, or the name of a built-in task: `gsm8k`."""
    prompts: list[Source] = Field(default_factory=list)
    """Held-out prompts, with the columns that the metrics read. Default: the built-in task's."""
    metrics: Annotated[list[Metric], AfterValidator(_distinct)] = Field(default_factory=list)
    """Verifiers, functions, reward servers and F1, each applied to every completion. Default: the built-in task's."""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """Sampling temperature; 0 is greedy decoding. Default: the built-in task's, otherwise `rollout.temperature`."""
    max_new_tokens: Positive | None = None
    """Maximum number of tokens of a completion. Default: the built-in task's, otherwise
    `rollout.max_new_tokens`."""


TaskName = Annotated[str, Field(min_length=1)]
"""A task as `align eval` names it: of lm-evaluation-harness, `suite:NAME`, or a .yaml or .py file."""


def _form(task: Any) -> str:
    return "section" if isinstance(task, dict | EvaluationTask) else "text"


AnyTask = Annotated[Annotated[EvaluationTask, Tag("section")] | Annotated[TaskName, Tag("text")], Discriminator(_form)]


def _named_apart(tasks: list[AnyTask]) -> list[AnyTask]:
    names = [task if isinstance(task, str) else task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} tasks are called '{name}'; set a different `name` for each")
    return tasks


Tasks = Annotated[list[AnyTask], AfterValidator(_named_apart)]


class TaskOptions(Section):
    """Settings of the tasks of `align eval`, under the names of its options."""

    data: Location | None = None
    """Folder of data sets; the data set X of a task is read from `data`/X."""
    limit: Positive | None = None
    """Documents per task, drawn with `seed`. A larger limit adds documents to a smaller one. Default: all."""
    samples: Positive = 1
    """Completions per request; more than one needs a temperature above 0."""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """Sampling temperature instead of each task's own; 0 is greedy decoding."""
    max_new_tokens: Positive | None = None
    """Maximum tokens per completion instead of each task's own."""
    max_length: Positive | None = None
    """Maximum tokens of prompt and completion. Default: 4096, or the model's context less two if that is smaller."""
    batch_size: Annotated[Positive, RUNTIME] = 64
    """Sequences at a time."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn documents and of the completions. It does not depend on the recipe's, so that runs with other
    seeds are measured on the same documents."""
    chat: bool = False
    """Render prompts with the chat template."""
    truncate: bool = False
    """Remove the beginning of prompts that are too long, and count them. false: their documents are not scored."""
    judges: list[Location] = Field(default_factory=list)
    """Judges of judged tasks: URLs of servers, YAML files with a judge's settings, folders of reward models."""
    judge_model: str | None = None
    """The model at a judge's URL, if the server has several."""


class EvaluateDuring(TaskOptions):
    """Evaluation of the trained weights while a stage runs: before the first step, every `every` steps, and at the
    end."""

    every: Positive
    """Steps between two evaluations."""
    tasks: list[TaskName] = Field(min_length=1)
    """Tasks as `align eval` names them."""
    metric: str | None = None
    """Metric of `keep` and `patience`, as TASK/METRIC. Default: the first metric of the first task."""
    keep: Literal["last", "best"] = "last"
    """Weights of the stage's result: the last ones, or those with the best `metric` (the earliest, if equal)."""
    patience: Positive | None = None
    """Stop after this many evaluations in a row without a better `metric`. Default: never."""

    @model_validator(mode="after")
    def _metric_is_used(self) -> EvaluateDuring:
        if self.metric is not None and self.keep == "last" and self.patience is None:
            raise ValueError("only keep and patience use metric; set keep to best, set patience, or remove metric")
        return self
