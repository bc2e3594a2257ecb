"""report.html of `align eval`: one page without requests, with leaderboard, charts and samples.

The tables and charts are HTML. The samples are data, which a script in the page filters, searches and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.eval.report.bars import charts
from align.eval.report.leaderboard import all_metrics, leaderboard, value
from align.eval.report.page import escape, page, scrolling
from align.eval.report.samples import samples
from align.eval.results import Results

SCRIPT = Path(__file__).with_name("evaluation.js")
NOTES = 6
"""Notes that are shown without a click."""
Section = tuple[str, str, list[str]]
"""(anchor, title, content)."""


def render_evaluation(results: Results) -> str:
    """The page for the results of an evaluation."""
    sections = [section for section in _sections(results) if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections)
    body = [
        *_header(results),
        f'<nav aria-label="Sections">{links}</nav></header><main>',
        *(
            f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{chr(10).join(content)}</section>'
            for anchor, title, content in sections
        ),
        "</main>",
    ]
    return page(f"Evaluation of {', '.join(results.models)}", body, script=SCRIPT.read_text(encoding="utf-8"))


def _sections(results: Results) -> Iterator[Section]:
    content = results.content
    yield "leaderboard", "Leaderboard", list(leaderboard(results))
    yield "bars", "Bars", list(charts(results))
    yield "figures", "Scores by place", list(_figures(results))
    yield "contamination", "Items in the training data", list(_contamination(content.get("contamination")))
    yield "samples", "Samples", list(samples(results))
    yield "numbers", "All metrics", [NUMBERS, *all_metrics(results)]
    yield "settings", "Settings", [_settings(results)]


NUMBERS = (
    '<p class="soft">Means with 95 % intervals. Unscored documents are not in the mean; they are counted, with those '
    "that lack records. Truncated: completions that reached max_new_tokens. No answer: completions in which no answer "
    "was found, which count as wrong. A slash separates the counts of models.</p>"
)


def _header(results: Results) -> Iterator[str]:
    tasks = dict.fromkeys(task for found in results.content["models"].values() for task in found["tasks"])
    models = results.models
    names = " · ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
    yield f'<header><p class="soft">Evaluation</p><h1>{escape(names or "No model")}</h1>'
    more = f"{len(models)} models, " if len(models) > 1 else ""
    version = results.content["align"]
    yield f"<p>{escape(f'{more}{len(tasks)} tasks and groups, align {version}')}</p>"
    notes = results.content["notes"]
    items = [f"<li>{escape(note)}</li>" for note in notes]
    if items:
        yield f'<ul class="notes box" aria-label="Notes">{"".join(items[:NOTES])}</ul>'
    if items[NOTES:]:
        yield f"<details><summary>{len(items) - NOTES} more notes</summary>"
        yield f'<ul class="notes box">{"".join(items[NOTES:])}</ul></details>'


def _figures(results: Results) -> Iterator[str]:
    """The figures of each task, one for each model."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for model in results.models:
        for task, result in results.content["models"][model]["tasks"].items():
            for title, svg in result.get("figures", {}).items():
                found.setdefault((task, title), {})[model] = svg
    for (task, title), by_model in found.items():
        yield f'<h3>{escape(task)}: {escape(title)}</h3><div class="figures">'
        for model, svg in by_model.items():
            place = results.models.index(model) % 7
            head = f'<h4><i class="dot m{place}"></i>{escape(model)}</h4>'
            yield f"<figure>{head}{scrolling(f'{title}, {model}', svg, 'bare')}</figure>"
        yield "</div>"


def _contamination(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Scores with and without the items that the training data contains, and both texts side by side."""
    if found is None:
        return
    yield (
        f'<p class="soft">{found["rows"]:,} rows of {escape(found["run"])}. An item is flagged if a row has at least '
        f"{100 * found['threshold']:.0f} % of its word 3-grams (6-grams of characters in Chinese).</p>"
    )
    heads = ["Task", "flagged", "Model", "Metric", "all", "without flagged", "flagged only"]
    rows = []
    for task, of_task in found["tasks"].items():
        flagged = f"{len(of_task['flagged'])} of {of_task['documents']}"
        for model, metrics in of_task["scores"].items():
            for metric, parts in metrics.items():
                cells = "".join(f"<td>{value(parts[part])}</td>" for part in ("all", "clean", "flagged"))
                names = "".join(f"<td>{escape(name)}</td>" for name in (flagged, model, metric))
                rows.append(f'<tr class="task"><th scope="row">{escape(task)}</th>{names}{cells}</tr>')
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    table = f'<table class="numbers"><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    yield scrolling("Scores without flagged items", table)
    for task, of_task in found["tasks"].items():
        matches = sorted(of_task["flagged"].items(), key=lambda item: -item[1]["share"])
        if not matches:
            continue
        many = "1 flagged item" if len(matches) == 1 else f"{len(matches)} flagged items"
        yield f"<details><summary>{escape(task)}: {many} beside the training text</summary>"
        for document, match in matches:
            share = f"{100 * match['share']:.0f} % of its n-grams"
            yield f'<div class="card"><h3>document {escape(document)}, {share}</h3><div class="completions">'
            for title, key in (("item", "item"), (match["where"], "training")):
                box = f'<p class="text" dir="auto" tabindex="0">{escape(match[key])}</p>'
                yield f"<div><h3>{escape(title)}</h3>{box}</div>"
            yield "</div></div>"
        yield "</details>"


def _settings(results: Results) -> str:
    """Checkpoints and settings as two columns."""
    rows: list[tuple[str, Any]] = []
    for name, found in results.content["models"].items():
        rows.append((name, ", ".join(f"{key} {about}" for key, about in found.items() if key != "tasks")))
    rows += [(key, found) for key, found in results.content["settings"].items()]
    body = "".join(f"<tr><th scope='row'>{escape(key)}</th><td class='wide'>{_shown(v)}</td></tr>" for key, v in rows)
    return scrolling("Settings", f"<table class='settings'><tbody>{body}</tbody></table>")


def _shown(setting: Any) -> str:
    if setting is None or setting == []:
        return '<span class="soft">not set</span>'
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    return escape(", ".join(map(str, setting)) if isinstance(setting, list | tuple) else setting)
