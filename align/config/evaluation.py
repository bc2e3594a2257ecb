"""Tasks of an evaluate stage: held-out prompts, sampling settings and metrics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from align.config.parts import Source
from align.config.rewards import ModelReward, Reward, RewardBase
from align.config.section import Positive, Section

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
    for key in FOR_REWARDS:
        if key in metric.model_fields_set:
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
    """Tokens after which a completion is truncated. Default: the built-in task's, otherwise
    `rollout.max_new_tokens`."""


def _tasks_named_apart(tasks: list[EvaluationTask]) -> list[EvaluationTask]:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} tasks are called '{name}'; give each its own `name`")
    return tasks


Tasks = Annotated[list[EvaluationTask], AfterValidator(_tasks_named_apart)]
