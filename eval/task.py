"""Tasks of an evaluation and their typed results.

A task is prompts, sampling settings and metrics. A built-in task is one file in `align/eval/tasks`. A recipe defines
its own tasks, or overrides parts of a built-in one, in `tasks` of an evaluate stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.config.evaluation import EvaluationTask, Metric
from align.config.parts import Source
from align.config.rollout import Rollout
from align.errors import UserError


@dataclass(frozen=True)
class Task:
    """A benchmark.

    name: name in results and report.
    prompts: sources of held-out prompts, with the columns that the metrics read.
    metrics: verifiers, functions, reward servers and F1, each applied to every completion.
    max_new_tokens: tokens after which a completion is truncated.
    temperature: sampling temperature; 0 is greedy decoding.
    """

    name: str
    prompts: Sequence[Source]
    metrics: Sequence[Metric]
    max_new_tokens: int
    temperature: float = 0.0


@dataclass(frozen=True)
class MetricResult:
    """One metric of one model on one task.

    kind: kind of the metric in the recipe, for example `math`.
    values: one value per prompt; None if the completion was not scored.
    mean: mean of the scored values; None if there are none or if a value is not finite.
    standard_error: standard error of the mean; None for fewer than two values or if a value is not finite.
    low, high: ends of the 95 % confidence interval; None if they are unknown.
    n: number of scored prompts.
    unscored: prompts excluded from the mean, because they have no reference or a function failed.
    not_finite: scored values that are NaN or infinite.
    method: how the interval was computed; empty if there is none.
    unanswered: completions of a `math` metric without a final answer; they count as 0.
    """

    kind: str
    values: list[float | None]
    mean: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    not_finite: int
    method: str = ""
    unanswered: int = 0


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    n: number of prompts.
    truncated: completions that were truncated at max_new_tokens.
    mean_length: mean completion length in tokens, including the stop token.
    metrics: results by the metric's name.
    """

    n: int
    truncated: int
    mean_length: float
    metrics: dict[str, MetricResult]


def resolve_task(settings: EvaluationTask, rollout: Rollout) -> Task:
    """Build the task that an entry of `tasks` in a recipe describes.

    Omitted settings come from the built-in task of the same name. If there is none, temperature and max_new_tokens
    come from `rollout`; prompts and metrics are then required.

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
    defaults = built_in or rollout
    temperature = defaults.temperature if settings.temperature is None else settings.temperature
    max_new_tokens = settings.max_new_tokens or defaults.max_new_tokens
    if max_new_tokens >= rollout.max_model_length:
        raise UserError(
            f"task '{settings.name}' has max_new_tokens {max_new_tokens}, which leaves no tokens for a prompt in "
            f"rollout.max_model_length {rollout.max_model_length}; raise rollout.max_model_length, or set "
            "max_new_tokens of the task."
        )
    return Task(settings.name, prompts, metrics, max_new_tokens, temperature)
