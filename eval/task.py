"""Tasks of an evaluation and their typed results.

A `Task` makes requests of its documents and scores the model's answers. `align eval` runs any task.

A `PromptTask` is prompts, sampling settings and metrics. A built-in one is one file in `align/eval/tasks`. A recipe
defines its own, or overrides parts of a built-in one, in `tasks` of an evaluate stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from align.config.evaluation import EvaluationTask, Metric
from align.config.parts import Source
from align.config.rollout import Rollout
from align.errors import UserError
from align.eval.records import Record
from align.rollout.requests import Pair, Request

if TYPE_CHECKING:
    from align.eval.encoder import Encoder


class Item(NamedTuple):
    """One request of a document.

    document: id of the document.
    request: a completion or a target, or the reason why the request cannot be made.
    number: index of the request within the document, for example of the choice.
    part: number of the window, if a text is scored in several.
    sample: the only sample whose request this is, if it depends on an earlier answer. None: all samples.
    """

    document: str
    request: Request | Pair | str
    number: int = 0
    part: int = 0
    sample: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Scores of one document and sample.

    document: id of the document.
    sample: number of the sample.
    values: score by metric; None if the document was not scored.
    reason: why a value is None; "" if none is.
    unanswered: True if no answer was found in the completion, which then counts as wrong.
    shown: texts for the report: prompt, answer, target and the like.
    """

    document: str
    sample: int
    values: Mapping[str, float | None]
    reason: str = ""
    unanswered: bool = False
    shown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CorpusValue:
    """A metric that is not a mean over documents, for example BLEU or perplexity.

    value: of all documents. low, high: ends of the 95 % interval; None if unknown. method: how it was computed.
    """

    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""


@dataclass(frozen=True)
class Scores:
    """Scores of a task.

    verdicts: one per document and sample.
    corpus: metrics that are not means of the verdicts' values.
    notes: sentences for the reader of the numbers.
    figures: SVG by title.
    """

    verdicts: Sequence[Verdict]
    corpus: Mapping[str, CorpusValue] = field(default_factory=dict)
    notes: Sequence[str] = ()
    figures: Mapping[str, str] = field(default_factory=dict)


class Task(Protocol):
    """A benchmark.

    name: name in commands, records and results.
    version: changes when the numbers are no longer comparable.
    text: everything that affects the meaning of a request besides its token ids, for the records' keys; the name and
        version are enough for most tasks.
    better: by metric, 1 if higher is better, -1 if lower is, 0 if neither.
    """

    name: str
    version: str
    text: str
    better: Mapping[str, int]

    def documents(self) -> Sequence[str]:
        """Ids of all documents, each once."""
        ...

    def requests(self, documents: Sequence[str], encoder: Encoder) -> Iterable[Item]:
        """The requests of some documents, in order. `encoder` makes token ids, and raises `Unscorable`."""
        ...

    def score(self, records: Sequence[Record]) -> Scores:
        """Scores of the documents from their records alone; a document with an unscored record has no values."""
        ...


@runtime_checkable
class FollowUp(Protocol):
    """A task whose later requests depend on earlier answers, for example the second turn of a conversation."""

    def follow_up(self, records: Sequence[Record], encoder: Encoder) -> Iterable[Item]:
        """The requests that these records allow. They are called for again after they are answered, so the same records
        must give the same requests; those that are recorded are not answered twice."""
        ...


def by_sample(records: Sequence[Record]) -> dict[tuple[str, int], list[Record]]:
    """The records of each (document, sample) that is complete, in the order of the requests."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.place.number, record.place.part)):
        found.setdefault((record.document, record.place.sample), []).append(record)
    return {place: group for place, group in found.items() if len(group) >= max(record.of for record in group)}


def unscored(records: Sequence[Record]) -> str:
    """Reason why the document of these records cannot be scored; "" if it can."""
    return next((record.reason for record in records if record.status == "unscored"), "")


@dataclass(frozen=True)
class PromptTask:
    """A task of an evaluate stage.

    name: name in results and report.
    prompts: sources of held-out prompts, with the columns that the metrics read.
    metrics: verifiers, functions, reward servers and F1, each applied to every completion.
    max_new_tokens: maximum number of tokens of a completion.
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


def resolve_task(settings: EvaluationTask, rollout: Rollout) -> PromptTask:
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
    return PromptTask(settings.name, prompts, metrics, max_new_tokens, temperature)
