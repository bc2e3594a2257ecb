"""Tasks of an evaluation and their typed results.

A task is prompts, sampling settings and metrics. A built-in task is one file in `align/eval/tasks`; a recipe defines
its own, or overrides parts of a built-in one, in `tasks` of an evaluate stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from align.config.evaluation import EvaluationTask, Metric
from align.config.parts import Source
from align.config.rollout import Rollout
from align.errors import UserError


@dataclass(frozen=True)
class Task:
    """A benchmark.

    name: name in results and report.
    prompts: sources of held-out prompts, with the columns that the metrics read.
    metrics: verifiers, functions and F1, each applied to every completion.
    temperature: sampling temperature; 0 is greedy decoding, None is `rollout.temperature`.
    max_new_tokens: tokens after which a completion is truncated; None is `rollout.max_new_tokens`.
    """

    name: str
    prompts: Sequence[Source]
    metrics: Sequence[Metric]
    temperature: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class MetricResult:
    """One metric of one model on one task.

    kind: kind of the metric in the recipe, for example `math`.
    values: one value per prompt; None if the completion could not be scored.
    n: number of scored prompts.
    mean: mean of the scored values; None if there are none.
    standard_error: standard error of the mean; None below two values.
    low, high: ends of the 95 % bootstrap interval; None below two values.
    unscored: prompts left out of the mean, for example without a reference or because a function failed.
    unanswered: completions of a `math` metric without a final answer; they count as 0.
    """

    kind: str
    values: list[float | None]
    n: int
    mean: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    unscored: int = 0
    unanswered: int = 0


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    n: number of prompts.
    truncated: completions that were cut at max_new_tokens.
    mean_length: mean completion length in tokens, the end-of-sequence token included.
    metrics: results by the metric's name.
    """

    n: int
    truncated: int
    mean_length: float
    metrics: dict[str, MetricResult]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def resolve(settings: EvaluationTask, rollout: Rollout) -> Task:
    """The task of a recipe's section: its own settings, then the built-in task's, then the rollout's.

    Raises `UserError` if prompts or metrics are missing, or if no tokens are left for a prompt.
    """
    from align.eval.tasks import built_in_tasks  # the built-in tasks import this module

    built_in = built_in_tasks().get(settings.name)
    prompts = settings.prompts or (built_in.prompts if built_in else ())
    metrics = settings.metrics or (built_in.metrics if built_in else ())
    for key, found in (("prompts", prompts), ("metrics", metrics)):
        if not found:
            raise UserError(
                f"task '{settings.name}' has no {key} and is not a built-in task ({', '.join(built_in_tasks())}); "
                f"add {key}, or use a built-in name."
            )
    temperature, max_new_tokens = settings.temperature, settings.max_new_tokens
    if built_in is not None:
        temperature = built_in.temperature if temperature is None else temperature
        max_new_tokens = built_in.max_new_tokens if max_new_tokens is None else max_new_tokens
    temperature = rollout.temperature if temperature is None else temperature
    max_new_tokens = rollout.max_new_tokens if max_new_tokens is None else max_new_tokens
    if max_new_tokens >= rollout.max_model_length:
        raise UserError(
            f"task '{settings.name}' has max_new_tokens {max_new_tokens}, which leaves no tokens for a prompt in "
            f"rollout.max_model_length {rollout.max_model_length}; raise rollout.max_model_length, or set "
            "max_new_tokens of the task."
        )
    return Task(settings.name, prompts, metrics, temperature, max_new_tokens)
