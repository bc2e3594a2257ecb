"""Metrics of an evaluation: pairs in the right order, word F1, and the verifiers of `align.reward` applied to a task.

A value per prompt is a number, NaN if it was computed and is not finite, or None if the completion was not scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.evaluation import F1Metric, Metric
from align.config.rewards import ChoiceReward, FunctionReward, MathReward
from align.errors import UserError
from align.eval.statistics.summary import summarize
from align.eval.task import MetricResult
from align.reward.components import Component, Samples, build_component, compared_column, has_column
from align.reward.process import FunctionProcess
from align.reward.text import accepted_values, is_missing, spellings, token_f1
from align.reward.verifiers import Sample, verifier


def ordered_pairs(chosen: Sequence[float], rejected: Sequence[float]) -> list[float]:
    """Per pair 1 if `chosen` is higher, 0.5 for a tie, 0 if it is lower, NaN if one of the two is not finite."""
    pairs = zip(chosen, rejected, strict=True)
    return [float(c > r) + 0.5 * float(c == r) if math.isfinite(c) and math.isfinite(r) else math.nan for c, r in pairs]


def reference_texts(cell: Any) -> list[str]:
    """Reference texts in a data cell; numbers count as text. Empty if the cell has none."""
    texts = [spellings(value)[0] for value in accepted_values(cell)]
    return [text for text in texts if text.strip()]


def best_f1(completion: str, cell: Any) -> float | None:
    """Largest word F1 of the completion with any of the cell's reference texts; None if the cell has none."""
    return max((token_f1(completion, text) for text in reference_texts(cell)), default=None)


@verifier(F1Metric)
def verify_f1(metric: F1Metric, sample: Sample) -> float | None:
    return best_f1(sample.text, sample.row.get(metric.column))


def require_scorable(task: str, metrics: Sequence[Metric], samples: Samples) -> None:
    """Raise `UserError` for a metric whose column is empty in every row."""
    for metric in metrics:
        if not any(has_column(metric, row) for row in samples.prompt_rows):
            found = {key for row in samples.rows for key, value in row.items() if not is_missing(value)}
            raise UserError(
                f"task '{task}': metric '{metric.label}' compares with the column '{compared_column(metric)}', which "
                f"is empty in every row; columns with values: {', '.join(sorted(found))}. Set the metric's `column`, "
                "or rename the column with the source's `columns`."
            )


def build_metric(metric: Metric, process: FunctionProcess, tokenizer: PreTrainedTokenizerBase) -> Component:
    """The component of a metric. A function that fails leaves the completion unscored instead of ending the run."""
    if isinstance(metric, FunctionReward):
        metric = metric.model_copy(update={"failure_score": 0.0})
    return build_component(metric, process, tokenizer)


def measure(
    metric: Metric, component: Component, samples: Samples, *, resamples: int, seed: int
) -> tuple[MetricResult, str]:
    """(result of a metric on a task's completions, reason of one failure or "").

    A completion without a final answer counts as 0 for a `math` or `choice` metric. Rows without the column
    that the metric compares with, and completions on which a function failed, are unscored.
    """
    places = [i for i, row in enumerate(samples.prompt_rows) if has_column(metric, row)]
    scorable = Samples(
        [samples.prompt_rows[i] for i in places], [samples.completions[i] for i in places], samples.tokenizer
    )
    scored = component(scorable)
    unanswered = 0
    values: list[float | None] = [None] * len(samples)
    for place, score in zip(places, scored.scores, strict=True):
        if score is None and isinstance(metric, MathReward | ChoiceReward):
            unanswered += 1
            score = 0.0
        values[place] = score
    summary = summarize(values, resamples=resamples, seed=seed)
    return MetricResult(metric.kind, values, **summary._asdict(), unanswered=unanswered), scored.problem
