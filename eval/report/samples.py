"""The samples of an evaluation as data for the page's script, which filters, searches and compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from align.eval.report.page import data_block, escape
from align.eval.results import Results
from align.run.folder import read_jsonl

TEXT_BUDGET = 32_000_000
"""Maximum number of characters on the page, which a browser opens in a few seconds. Further samples are counted."""
UNANSWERED, TRUNCATED = 1, 2
"""Flags of a model's answer: no answer was found in it; a completion reached max_new_tokens."""


@dataclass(frozen=True)
class Sample:
    """One document and sample of a task.

    verdicts: {model: row of scores.jsonl}. truncated: models with a truncated completion.
    """

    task: str
    document: str
    sample: int
    verdicts: dict[str, dict[str, Any]]
    truncated: set[str]

    @property
    def common(self) -> dict[str, str]:
        """Texts that are the same for all models."""
        first, *others = (verdict["shown"] for verdict in self.verdicts.values())
        return {key: value for key, value in first.items() if all(shown.get(key) == value for shown in others)}

    @property
    def size(self) -> int:
        """Number of characters of its texts."""
        common = self.common
        own = (verdict["shown"].items() for verdict in self.verdicts.values())
        return sum(map(len, common.values())) + sum(len(v) for items in own for k, v in items if k not in common)

    def interest(self, metric: str) -> tuple[bool, float]:
        """Sorts samples on which the models differ before the others, and low scores before high ones."""
        values = [verdict["values"].get(metric) for verdict in self.verdicts.values()]
        known = [value for value in values if value is not None]
        return len(set(values)) == 1, sum(known) / len(known) if known else -1.0


def samples(results: Results) -> Iterator[str]:
    """The controls, and the data. Without scripts, a sentence says where the samples are."""
    found = collect(results)
    tasks = metric_names(found)
    kept = keep(found, {name: metrics[0] for name, metrics in tasks.items() if metrics}, TEXT_BUDGET)
    if not kept:
        yield '<p class="soft">There are no samples.</p>'
        return
    if len(kept) < len(found):
        yield (
            f'<p class="soft">{len(kept):,} of {len(found):,} samples are on this page, those on which the models '
            "differ and those with low scores first. MODEL/scores.jsonl has all.</p>"
        )
    yield "<noscript><p>The samples are shown by a script. MODEL/scores.jsonl has them too.</p></noscript>"
    yield EXPLORER
    names = list(tasks)
    numbers = {task: number for number, task in enumerate(names)}
    yield data_block(
        "samples-data",
        {
            "models": results.models,
            "tasks": [{"name": name, "metrics": tasks[name]} for name in names],
            "samples": [_content(sample, numbers[sample.task], tasks[sample.task], results.models) for sample in kept],
        },
    )


def collect(results: Results) -> list[Sample]:
    """All samples of all models, in the order of the tasks and documents."""
    found: dict[tuple[str, str, int], Sample] = {}
    for model in results.models:
        truncated = _truncated(results, model)
        for row in results.all_verdicts(model):
            place = row["task"], row["document"], row["sample"]
            sample = found.setdefault(place, Sample(*place, {}, set()))
            sample.verdicts[model] = row
            if place in truncated:
                sample.truncated.add(model)
    return list(found.values())


def _truncated(results: Results, model: str) -> set[tuple[str, str, int]]:
    """(task, document, sample) of each completion of a model that reached max_new_tokens."""
    rows = read_jsonl(results.folder / model / "records.jsonl")
    last = {(row["task"], row["version"], *row["place"]): row for row in rows}
    # Records of another version of a task are not scored.
    versions = {task: result["version"] for task, result in results.content["models"][model]["tasks"].items()}
    return {
        (row["task"], str(row["place"][0]), int(row["place"][3]))
        for row in last.values()
        if row["status"] == "truncated" and versions.get(row["task"]) == row["version"]
    }


def metric_names(found: Sequence[Sample]) -> dict[str, list[str]]:
    """By task the metrics that its verdicts have."""
    names: dict[str, dict[str, None]] = {}
    for sample in found:
        of_task = names.setdefault(sample.task, {})
        for verdict in sample.verdicts.values():
            of_task |= dict.fromkeys(verdict["values"])
    return {task: list(of_task) for task, of_task in names.items()}


def keep(found: Sequence[Sample], metrics: Mapping[str, str], budget: int) -> list[Sample]:
    """The samples that fit into `budget` characters, by turns from each task; in their own order.

    metrics: {task: metric that selects the samples}.
    """
    if sum(sample.size for sample in found) <= budget:
        return list(found)
    tasks: dict[str, list[int]] = {}
    for number, sample in enumerate(found):
        tasks.setdefault(sample.task, []).append(number)
    for task, numbers in tasks.items():
        numbers.sort(key=lambda number: found[number].interest(metrics.get(task, "")))
    chosen, left = [], budget
    for turn in zip_longest(*tasks.values()):
        for number in turn:
            if number is not None and (left := left - found[number].size) >= 0:
                chosen.append(number)
        if left < 0:
            break
    return [found[number] for number in sorted(chosen)]


def _content(sample: Sample, task: int, metrics: Sequence[str], models: Sequence[str]) -> list[Any]:
    """[task, document, sample, common texts, answer of each model]; an answer is [values, flags, reason, own texts]."""
    common = sample.common
    answers: list[list[Any] | None] = []
    for model in models:
        verdict = sample.verdicts.get(model)
        if verdict is None:
            answers.append(None)
            continue
        values = [_rounded(verdict["values"].get(name)) for name in metrics]
        flags = UNANSWERED * bool(verdict["unanswered"]) + TRUNCATED * (model in sample.truncated)
        own = {key: value for key, value in verdict["shown"].items() if key not in common}
        answers.append([values, flags, verdict["reason"], own])
    return [task, sample.document, sample.sample, common, answers]


def _rounded(value: float | None) -> float | str | None:
    """The value with six digits; a text for NaN and infinity, which JSON does not have."""
    if value is None:
        return None
    short = float(f"{value:.6g}")
    return short if abs(short) < float("inf") else str(short)


EXPLORER = f"""<div id="explorer" hidden>
<div class="controls">
<label class="wide">Search<input id="x-search" type="search" autocomplete="off" spellcheck="false"
 placeholder="{escape("text of questions, answers and targets")}"></label>
<label>Task<select id="x-task"></select></label>
<label>Metric<select id="x-metric"></select></label>
<label>Model<select id="x-first"></select></label>
<label>Compared with<select id="x-second"></select></label>
<label>Show<select id="x-show"></select></label>
<label>Order<select id="x-order"></select></label>
<label class="check"><input id="x-marks" type="checkbox" checked>Mark differences</label>
<button id="x-reset" type="button">Reset</button>
</div>
<p id="x-found" role="status" tabindex="-1"></p>
<ol id="x-list"></ol>
<div class="pages"><button id="x-before" type="button">Previous</button><span id="x-place"></span><button
 id="x-after" type="button">Next</button></div>
</div>"""
