"""report.md: the tables of a report as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from align.eval.report.formatting import NOTHING, certainty, duration, flat, interval, mark, mean, number, plain
from align.run.metrics import titled, titled_of_model


def render_markdown(report: dict[str, Any]) -> str:
    """The content of `align.eval.report.write.build_report` as Markdown."""
    lines = [f"# Run {_cell(report['name'])}", ""]
    if report["recipe"]["description"]:
        lines += [plain(report["recipe"]["description"]), ""]
    lines += [f"**{_cell(report['verdict'])}**", ""]
    lines += [f"- {_cell(note)}" for note in report["notes"]]
    lines += ["", f"## Stages ({duration(report['total_seconds'])} in all)", ""]
    lines += _table(
        ["stage", "kind", "status", "time", "parameters: total / active / trained"],
        [[s["name"], s["kind"], status(s), duration(s["seconds"]), parameters(s)] for s in report["stages"]],
    )
    for evaluation in report["evaluations"]:
        lines += _comparison(evaluation)
    lines += ["## Final metrics and data", ""]
    for stage in report["stages"]:
        metrics, data = final_metrics(stage), list(flat(stage["data"] or {}))
        if metrics or data:
            lines += [f"### {stage['name']}", ""]
            lines += _table(["what", "value"], [[key, number(value)] for key, value in (*metrics, *data)])
    lines += _provenance(report)
    for evaluation in report["evaluations"]:
        lines += _samples(evaluation)
    return "\n".join(lines).rstrip() + "\n"


def final_metrics(stage: dict[str, Any]) -> list[tuple[str, Any]]:
    """Title with the unit, and value, of each metric in a stage's manifest."""
    title = titled_of_model if stage["kind"] == "evaluate" else titled
    return [(title(key), value) for key, value in flat(stage["metrics"] or {})]


def status(stage: dict[str, Any]) -> str:
    """Status of a stage; `stale` if its result does not belong to those beside it."""
    return "stale" if stage["stale"] else str(stage["status"])


def stale_line(evaluation: dict[str, Any]) -> str:
    """Warning above a comparison that is stale; empty if it is not."""
    return f"Stale: {evaluation['stale']}. The numbers are not of the present models." if evaluation["stale"] else ""


def parameters(stage: dict[str, Any]) -> str:
    """Total, active and trainable parameters of a stage's model."""
    counts = stage["parameters"]
    if not counts:
        return NOTHING
    return " / ".join(number(counts.get(key)) for key in ("total", "active", "trainable"))


def _comparison(evaluation: dict[str, Any]) -> Iterator[str]:
    metrics = evaluation["metrics"]
    labels = [metric["label"] for metric in metrics]
    yield from (f"## Comparison ({_cell(evaluation['stage'])})", "")
    if warning := stale_line(evaluation):
        yield from (f"**{_cell(warning)}**", "")
    yield from (caveat(evaluation), "")
    rows = [[name, *(_value(metric["models"].get(name)) for metric in metrics)] for name in evaluation["models"]]
    yield from _table(["model", *labels], rows)
    differences = [
        [f"{model} − {against}", *(_difference(metric, model, against) for metric in metrics)]
        for model, against in evaluation["pairs"]
    ]
    if differences:
        yield from ("Paired differences (▲ above zero, ▼ below, ≈ the interval includes zero):", "")
        yield from _table(["difference", *labels], differences)
    if accuracy := reward_model_line(evaluation):
        yield from (accuracy, "")
    if evaluation["tasks"]:
        yield from ("### Tasks", "", tasks_line(evaluation), "")
        yield from _table(TASK_HEAD, task_rows(evaluation))


def caveat(evaluation: dict[str, Any]) -> str:
    """Number of items that the means are taken over, and what the intervals cover."""
    counts = [cell["n"] for metric in evaluation["metrics"] for cell in metric["models"].values() if cell["n"]]
    unscored = sum(cell["unscored"] for metric in evaluation["metrics"] for cell in metric["models"].values())
    many = (
        f"{min(counts)}"
        if counts and min(counts) == max(counts)
        else f"{min(counts)} to {max(counts)}"
        if counts
        else "0"
    )
    text = (
        f"Means over {many} held-out items with 95 % intervals: Wilson's for shares, otherwise the BCa bootstrap "
        f"({number(evaluation['resamples'])} resamples). Differences are paired by prompt. p is of McNemar's exact "
        "test or of a permutation test, on tasks adjusted for their number (Holm). A true difference of the size "
        "after “detects” would be found in four of five cases. The intervals cover the choice of prompts, not the "
        "variance between training runs with other seeds."
    )
    return text + (f" {unscored} unscored values are not in the means." if unscored else "")


def reward_model_line(evaluation: dict[str, Any]) -> str:
    """Accuracy of the reward model itself; empty if it was not measured."""
    accuracy = evaluation["reward_model_accuracy"] or {}
    if accuracy.get("accuracy") is None:
        return ""
    share = accuracy["accuracy"] if isinstance(accuracy["accuracy"], str) else f"{accuracy['accuracy']:.1%}"
    return f"Accuracy of the reward model on {number(accuracy.get('n'))} held-out pairs: {share}."


TASK_HEAD = [
    "Task",
    "Model",
    "Metric",
    "Mean",
    "Standard error",
    "Scored",
    "Unscored",
    "No answer",
    "Truncated",
    "Length",
]


def task_rows(evaluation: dict[str, Any]) -> Iterator[list[str]]:
    """Cells of the table of tasks under `TASK_HEAD`: a row for each task, model and metric."""
    for task in evaluation["tasks"]:
        for model in task["models"]:
            for label, metric in model["metrics"].items():
                yield [
                    task["task"],
                    model["model"],
                    label,
                    mean(metric),
                    number(metric["standard_error"]),
                    number(metric["n"]),
                    number(metric["unscored"]),
                    number(metric["unanswered"]),
                    number(model["truncated"]),
                    number(model["mean_length"]),
                ]


def tasks_line(evaluation: dict[str, Any]) -> str:
    """Sampling settings of the tasks, and the meaning of the counts."""
    settings = []
    for task in evaluation["tasks"]:
        sampling = f"temperature {number(task['temperature'])}" if task["temperature"] else "greedy decoding"
        settings.append(f"{task['task']}: {sampling}, at most {number(task['max_new_tokens'])} new tokens")
    return (
        f"{'; '.join(settings)}. Unscored prompts are not in the mean. A completion without a final answer counts "
        "as 0. Truncated completions reached the limit of new tokens."
    )


def find_difference(metric: dict[str, Any], model: str, against: str) -> dict[str, Any] | None:
    """The difference of two models in one metric; None if it was not computed."""
    wanted = (d for d in metric["differences"] if (d["model"], d["against"]) == (model, against))
    return next(wanted, None)


def _value(cell: dict[str, Any] | None) -> str:
    return f"{mean(cell)} {interval(cell)}".rstrip() if cell else NOTHING


def _difference(metric: dict[str, Any], model: str, against: str) -> str:
    cell = find_difference(metric, model, against)
    return f"{mean(cell, signed=True)} {interval(cell)} {mark(cell)}{certainty(cell)}" if cell else NOTHING


def _provenance(report: dict[str, Any]) -> Iterator[str]:
    yield from ("## Provenance", "")
    rows = [
        [s["name"], commit(s), s["config_hash"] or NOTHING, number(s["seed"]), parents(s)] for s in report["stages"]
    ]
    yield from _table(["stage", "commit", "config hash", "seed", "parents"], rows)
    machines = (
        "; ".join(f"{key}: {number(value)}" for key, value in machine.items()) for machine in report["hardware"]
    )
    yield from (f"- Machine: {_cell(machine)}" for machine in machines)
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    yield from (f"- Packages: {_cell(packages) or NOTHING}", f"- Generated: {report['generated']}", "")


def commit(stage: dict[str, Any]) -> str:
    """Short hash of the commit that a stage ran from, marked if the working tree had changes."""
    if not stage["commit"]:
        return NOTHING
    return str(stage["commit"])[:12] + (" + changes" if stage["dirty"] else "")


def parents(stage: dict[str, Any]) -> str:
    """A stage's parents, as its manifest names them."""
    return ", ".join(f"{key}: {value}" for key, value in flat(stage["parents"] or {})) or NOTHING


def _samples(evaluation: dict[str, Any]) -> Iterator[str]:
    if not evaluation["samples"]:
        return
    yield from (f"## Samples ({_cell(evaluation['stage'])})", "", samples_line(evaluation), "")
    for sample in evaluation["samples"]:
        yield from (f"### {_cell(sample['title'])}", "", *_fenced(sample["prompt"]))
        if sample["reference"] is not None:
            yield from ("reference:", "", *_fenced(sample["reference"]))
        for model, completion in sample["completions"].items():
            score = sample["scores"].get(model)
            yield from (f"{_cell(model)}{f' (score {number(score)})' if score is not None else ''}:", "")
            yield from _fenced(completion)


def samples_line(evaluation: dict[str, Any]) -> str:
    """Number of the samples and how they were selected."""
    shown = len(evaluation["samples"])
    return f"{shown} of {evaluation['prompts']} stored prompts: the first ones, not selected by quality."


def _fenced(text: str) -> tuple[str, ...]:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return (f"{fence}text", text, fence, "")


def _table(head: list[str], rows: Iterable[list[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(_cell(value) for value in line)} |" for line in lines] + [""]


def _cell(value: Any) -> str:
    """Text for one table cell or line, escaped so that it is not read as HTML."""
    text = plain(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(text.split())
