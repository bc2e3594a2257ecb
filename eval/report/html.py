"""report.html: one page without scripts or requests, from the content of report.json and the curves.

`page.escape` escapes every text that can come from a recipe, a data set or a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

from align.eval.report.formatting import NOTHING, certainty, duration, flat, interval, mark, mean, number
from align.eval.report.markdown import (
    TASK_HEAD,
    caveat,
    commit,
    final_metrics,
    find_difference,
    parameters,
    parents,
    reward_model_line,
    samples_line,
    stale_line,
    task_rows,
    tasks_line,
)
from align.eval.report.page import escape, page, scrolling
from align.eval.report.plots import Plot, comparison_plots, stage_plots


def render_html(report: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> str:
    """The page for `report`, with plots of `curves` (rows of metrics.jsonl by stage)."""
    sections = [
        _section("stages", f"Stages: {duration(report['total_seconds'])} in all", _timeline(report)),
        *(
            _section(f"comparison-{i}", f"Comparison{_of(e, report)}", _comparison(e, i))
            for i, e in enumerate(report["evaluations"])
        ),
        _section("training", "Training", _training(report, curves)),
        *(
            _section(f"samples-{i}", f"Samples{_of(e, report)}", _samples(e))
            for i, e in enumerate(report["evaluations"])
            if e["samples"]
        ),
        _section("provenance", "Provenance", _provenance(report)),
    ]
    shown = [(anchor, title.partition(":")[0], body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in shown)
    body = [
        *_header(report, links),
        "<main>",
        *(body for _, _, body in shown),
        "</main>",
        f'<footer class="soft">Generated {escape(report["generated"])}.</footer>',
    ]
    return page(f"{report['name']}: run report", body)


def _section(anchor: str, title: str, parts: Iterable[str]) -> tuple[str, str, str]:
    body = "\n".join(parts)
    return anchor, title, f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{body}</section>' if body else ""


def _of(evaluation: dict[str, Any], report: dict[str, Any]) -> str:
    """The stage's name for a title; empty if only one stage evaluates."""
    return f" ({evaluation['stage']})" if len(report["evaluations"]) > 1 else ""


def _header(report: dict[str, Any], links: str) -> Iterator[str]:
    yield f'<header><p class="soft">Run report</p><h1>{escape(report["name"])}</h1>'
    if report["recipe"]["description"]:
        yield f"<p>{escape(report['recipe']['description'])}</p>"
    lines = "".join(f"<li>{escape(line)}</li>" for line in report["verdict"].rstrip(".").split("; "))
    yield f'<div class="verdict"><ul>{lines}</ul></div>'
    if report["notes"]:
        yield f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in report["notes"])}</ul>'
    yield f'<dl class="tiles">{"".join(_tiles(report))}</dl><nav>{links}</nav></header>'


def _tiles(report: dict[str, Any]) -> Iterator[str]:
    finished = sum(stage["status"] == "finished" for stage in report["stages"])
    stale = sum(stage["stale"] is not None for stage in report["stages"])
    yield _tile("Stages finished", f"{finished} of {len(report['stages'])}", f"{stale} stale" if stale else "")
    yield _tile("Total time", duration(report["total_seconds"]))
    if report["evaluations"]:
        evaluation = report["evaluations"][-1]
        for metric in evaluation["metrics"]:
            name = next((name for name in reversed(evaluation["models"]) if name in metric["models"]), None)
            if metric["better"] and name:
                cell = metric["models"][name]
                yield _tile(metric["label"], mean(cell), f"{name} {interval(cell)}")


def _tile(term: str, value: str, detail: str = "") -> str:
    small = f"<small>{escape(detail)}</small>" if detail else ""
    return f"<div><dt>{escape(term)}</dt><dd>{escape(value)}{small}</dd></div>"


def _timeline(report: dict[str, Any]) -> Iterator[str]:
    """A bar for every stage, to the right of the bars before it."""
    total, start = report["total_seconds"] or 1.0, 0.0
    yield '<div class="card stages" style="padding:0">'
    for stage in report["stages"]:
        seconds = stage["seconds"] or 0.0
        style = f"margin-left:{98 * start / total:.2f}%;width:{98 * seconds / total:.2f}%"
        bar = f'<div class="bar" style="{style}"></div>' if seconds else ""
        time = duration(stage["seconds"]) if stage["seconds"] is not None else stage["status"]
        kind = "" if stage["kind"] == stage["name"] else f'<span class="soft">{escape(stage["kind"])}</span>'
        kind += ' <span class="down">stale</span>' if stage["stale"] else ""
        yield (
            f'<div class="stage"><div><b>{escape(stage["name"])}</b> {kind}</div>'
            f'<div class="track">{bar}</div><div class="time">{escape(time)}</div></div>'
        )
        start += seconds
    yield "</div>"


def _comparison(evaluation: dict[str, Any], index: int) -> Iterator[str]:
    metrics = evaluation["metrics"]
    if warning := stale_line(evaluation):
        yield f'<p class="down">{escape(warning)}</p>'
    yield f'<p class="soft">{escape(caveat(evaluation))}</p>'
    labels = [escape(metric["label"]) for metric in metrics]
    rows = []
    for name in evaluation["models"]:
        baseline = ' <span class="soft">baseline</span>' if name == evaluation["baseline"] else ""
        rows.append([f"{escape(name)}{baseline}", *(_value(metric["models"].get(name)) for metric in metrics)])
    yield table("Means by model", ["Model", *labels], rows)
    if evaluation["pairs"]:
        yield "<h3>Paired differences</h3>"
        rows = [
            [f"{escape(a)} − {escape(b)}", *(_difference(metric, a, b) for metric in metrics)]
            for a, b in evaluation["pairs"]
        ]
        yield table("Paired differences", ["Difference", *labels], rows)
        yield '<p class="soft">▲ above zero, ▼ below zero, ≈ the interval includes zero, ? no interval.</p>'
    if line := reward_model_line(evaluation):
        yield f"<p>{escape(line)}</p>"
    if evaluation["tasks"]:
        yield f'<h3>Tasks</h3><p class="soft">{escape(tasks_line(evaluation))}</p>'
        yield table("Tasks", TASK_HEAD, [[escape(cell) for cell in row] for row in task_rows(evaluation)])
    yield figures(comparison_plots(evaluation, f"cmp{index}"))


def _value(cell: dict[str, Any] | None) -> str:
    return f"{mean(cell)}<small>{interval(cell)}</small>" if cell else NOTHING


def _difference(metric: dict[str, Any], model: str, against: str) -> str:
    cell = find_difference(metric, model, against)
    if cell is None:
        return NOTHING
    sign = mark(cell)
    tone = {"▲": "up", "▼": "down"}.get(sign, "") if metric["better"] else ""
    shown = f"{sign} {mean(cell, signed=True)}"
    return f'<span class="nowrap {tone}">{shown}</span><small>{interval(cell)}{certainty(cell)}</small>'


def _training(report: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    for i, stage in enumerate(report["stages"]):
        rows, metrics = curves.get(stage["name"], []), final_metrics(stage)
        if stage["kind"] == "evaluate" or not (rows or metrics):
            continue
        about = f"{stage['kind']}, {duration(stage['seconds'])}"
        if stage["parameters"]:
            about += f"; parameters (total / active / trained): {parameters(stage)}"
        yield f"<h3>{escape(stage['name'])}</h3><p class='about soft'>{escape(about)}</p>"
        if stage["stale"]:
            yield f'<p class="down">Stale: {escape(stage["stale"])}.</p>'
        yield figures(stage_plots(stage["kind"], rows, f"s{i}"))
        if metrics:
            cells = [[escape(title), escape(number(value))] for title, value in metrics]
            yield _folded(f"Final metrics ({len(cells)})", table("Final metrics", ["Metric", "Value"], cells))


def figures(plots: list[Plot]) -> str:
    """The plots in a grid; empty if there are none."""
    if not plots:
        return ""
    drawn = []
    for plot in plots:
        caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
        drawn.append(f'<figure><h4>{escape(plot.title)}</h4><div class="paper">{plot.svg}</div>{caption}</figure>')
    return f'<div class="plots">{"".join(drawn)}</div>'


def _samples(evaluation: dict[str, Any]) -> Iterator[str]:
    yield f'<p class="soft">{escape(samples_line(evaluation))}</p>'
    for sample in evaluation["samples"]:
        completions, reference = [], ""
        if sample["reference"] is not None:
            reference = _completion("Reference", sample["reference"], "reference")
        for model, completion in sample["completions"].items():
            score = sample["scores"].get(model)
            completions.append(_completion(model if score is None else f"{model} · score {number(score)}", completion))
        yield (
            f'<article class="card"><h3>{escape(sample["title"])}</h3>'
            f'<p class="text prompt" dir="auto">{escape(sample["prompt"])}</p>'
            f'{reference}<div class="completions">{"".join(completions)}</div></article>'
        )


def _completion(title: str, completion: str, style: str = "") -> str:
    body = escape(completion) if completion.strip() else '<span class="soft">(empty)</span>'
    text = f'<p class="text" dir="auto" tabindex="0">{body}</p>'
    return f'<div class="{style}"><h3>{escape(title)}</h3>{text}</div>'


def _provenance(report: dict[str, Any]) -> Iterator[str]:
    head = ["Stage", "Commit", "Config hash", "Seed", "Made from", "Finished"]
    rows = [
        [
            escape(stage["name"]),
            f'<span class="nowrap">{escape(commit(stage))}</span>',
            escape(str(stage["config_hash"] or NOTHING)[:16]),
            escape(stage["seed"] if stage["seed"] is not None else NOTHING),
            escape(parents(stage)),
            f'<span class="nowrap">{escape(_moment(stage["finished"]) or stage["status"])}</span>',
        ]
        for stage in report["stages"]
    ]
    yield table("Provenance", head, rows, wide={4})
    data = [
        [f"{escape(stage['name'])}", escape(key), escape(number(value))]
        for stage in report["stages"]
        for key, value in flat(stage["data"] or {})
    ]
    if data:
        lost = [[escape(stage), escape(counts)] for stage, counts in _lost(report)]
        yield "<h3>Data</h3>"
        yield (
            table("Lost rows", ["Stage", "Rows dropped or truncated"], lost)
            if lost
            else "<p>No row was dropped or truncated.</p>"
        )
        yield _folded(
            f"All data counts ({len(data)})", table("Data counts", ["Stage", "What", "Value"], data, wide={2})
        )
    for machine in report["hardware"]:
        parts = (f"{key}: {number(value)}" for key, value in machine.items())
        yield f"<p><b>Machine</b> {escape('; '.join(parts))}</p>"
    if report["packages"]:
        cells = [[escape(name), escape(version)] for name, version in report["packages"].items()]
        yield _folded(f"Packages ({len(cells)})", table("Packages", ["Package", "Version"], cells))


def _moment(time: str | None) -> str:
    """Date, hour and minute of an ISO time; empty if there is none."""
    return time[:16].replace("T", " ") if time else ""


def _lost(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Per stage, the nonzero counts of dropped and truncated rows."""
    for stage in report["stages"]:
        counts = [
            f"{key} {number(value)}"
            for key, value in flat(stage["data"] or {})
            if ("dropped" in key or "truncated" in key) and isinstance(value, int | float) and value
        ]
        if counts:
            yield stage["name"], ", ".join(counts)


def table(label: str, head: list[str], rows: list[list[str]], wide: Set[int] = frozenset()) -> str:
    """A table in a scrolling box.

    label: what it holds, for a screen reader. rows: cells as HTML. wide: columns that may wrap.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td{' class=wide' if i in wide else ''}>{cell}</td>" for i, cell in enumerate(rest, start=1))
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    content = f"<table class='sticky'><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return scrolling(label, content)


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
