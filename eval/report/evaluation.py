"""report.html of `align eval`: one page without scripts or requests, with the numbers and samples of each task."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from align.eval.report.formatting import plain
from align.eval.report.html import POLICY, STYLE_SHEET
from align.eval.results import Results, shown

SAMPLES = 40
"""Documents shown per task: those on which the models differ first, then those with the lowest scores."""
SHOWN_CHARACTERS = 3000


def render_evaluation(results: Results) -> str:
    """The page for the results of an evaluation."""
    content = results.content
    title = f"Evaluation of {', '.join(results.models)}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{_text(title)}</title>",
            f"<style>{STYLE_SHEET.read_text(encoding='utf-8')}</style></head><body>",
            f"<header><h1>{_text(title)}</h1></header><main>",
            *_notes(content["notes"]),
            '<h2 id="numbers">Numbers</h2>',
            '<p class="soft">Means with 95 % intervals. Unscored documents are not in the mean.</p>',
            *_table(results),
            *_figures(results),
            *_contamination(content.get("contamination")),
            '<h2 id="samples">Samples</h2>',
            *_samples(results),
            '<h2 id="settings">Settings</h2>',
            *_pairs({"align": content["align"], **content["settings"]}),
            "</main></body></html>\n",
        ]
    )


def _text(value: Any) -> str:
    return html.escape(plain(value), quote=True)


def _notes(notes: list[str]) -> Iterator[str]:
    if notes:
        yield '<ul class="notes">' + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>"


def _table(results: Results) -> Iterator[str]:
    models = results.models
    heads = ["Task", "Metric", *models, "n", "unscored", "cut", "no answer"]
    yield '<div class="scroll"><table><thead><tr>' + "".join(f"<th>{_text(head)}</th>" for head in heads)
    yield "</tr></thead><tbody>"
    before = ""
    for task, metric, values in results.rows():
        counts = [results.content["models"][model]["tasks"][task] for model in values]
        first = f"{_text(task)}<small>{_text(counts[0]['version'])}</small>" if task != before else ""
        before = task
        cells = [f"<th>{first}</th>", f"<td>{_text(metric)}</td>"]
        cells += [f'<td class="nowrap">{_value(values.get(model))}</td>' for model in models]
        cells.append(f"<td>{'/'.join(str(value['n']) for value in values.values())}</td>")
        cells.append(f"<td>{'/'.join(str(c['unscored'] + c['missing']) for c in counts)}</td>")
        cells += [f"<td>{'/'.join(str(c[key]) for c in counts)}</td>" for key in ("cut", "unanswered")]
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def _value(metric: Mapping[str, Any] | None) -> str:
    mean, _, interval = shown(metric).partition(" ")
    return f"{_text(mean)}<small>{_text(interval)}</small>"


def _figures(results: Results) -> Iterator[str]:
    """The figures of each task, one for each model."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for model in results.models:
        for task, result in results.content["models"][model]["tasks"].items():
            for title, svg in result.get("figures", {}).items():
                found.setdefault((task, title), {})[model] = svg
    if found:
        yield '<h2 id="figures">Scores by place</h2>'
    for (task, title), by_model in found.items():
        yield f'<h3>{_text(task)}: {_text(title)}</h3><div class="plots">'
        for model, svg in by_model.items():
            yield f'<figure><h4>{_text(model)}</h4><div class="scroll">{svg}</div></figure>'
        yield "</div>"


def _contamination(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Scores with and without the items that the training data contains, and both texts side by side."""
    if found is None:
        return
    yield '<h2 id="contamination">Items in the training data</h2>'
    yield (
        f'<p class="soft">{found["rows"]:,} rows of {_text(found["run"])}. An item is flagged if a row has at least '
        f"{100 * found['threshold']:.0f} % of its word 3-grams (6-grams of characters in Chinese).</p>"
    )
    yield '<div class="scroll"><table><thead><tr>'
    heads = ["Task", "flagged", "Model", "Metric", "all", "without flagged", "flagged only"]
    yield "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>"
    for task, of_task in found["tasks"].items():
        flagged = f"{len(of_task['flagged'])} of {of_task['documents']}"
        for model, metrics in of_task["scores"].items():
            for metric, parts in metrics.items():
                cells = "".join(
                    f'<td class="nowrap">{_value(parts[part])}</td>' for part in ("all", "clean", "flagged")
                )
                names = "".join(f"<td>{_text(name)}</td>" for name in (flagged, model, metric))
                yield f"<tr><th>{_text(task)}</th>{names}{cells}</tr>"
    yield "</tbody></table></div>"
    for task, of_task in found["tasks"].items():
        matches = sorted(of_task["flagged"].items(), key=lambda item: -item[1]["share"])
        if not matches:
            continue
        yield f"<details><summary>{_text(task)}: {len(matches)} flagged items beside the training text</summary>"
        for document, match in matches:
            share = f"{100 * match['share']:.0f} % of its n-grams"
            yield f'<div class="card"><h3>document {_text(document)}, {share}</h3><div class="completions">'
            for title, key in (("item", "item"), (match["where"], "training")):
                yield f'<div><h3>{_text(title)}</h3><p class="text" dir="auto">{_text(match[key])}</p></div>'
            yield "</div></div>"
        yield "</details>"


def _samples(results: Results) -> Iterator[str]:
    tasks: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for model in results.models:
        for row in results.all_verdicts(model):
            if row["sample"] == 0:
                tasks.setdefault(row["task"], {}).setdefault(row["document"], {})[model] = row
    for task, documents in tasks.items():
        ordered = sorted(documents, key=lambda d: _interest(documents[d]))[:SAMPLES]
        total = f"{len(ordered)} of {len(documents)} documents"
        yield f"<details><summary>{_text(task)}: {total}</summary>"
        for document in ordered:
            yield from _sample(document, documents[document])
        yield "</details>"


def _interest(rows: Mapping[str, dict[str, Any]]) -> tuple[bool, float]:
    """Sorts documents on which the models differ before the others, and low scores before high ones."""
    values = [tuple(row["values"].values()) for row in rows.values()]
    known = [value for found in values for value in found if value is not None]
    return len(set(values)) == 1, sum(known) / len(known) if known else -1.0


def _sample(document: str, rows: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    first = next(iter(rows.values()))
    common = {
        key: text for key, text in first["shown"].items() if all(r["shown"].get(key) == text for r in rows.values())
    }
    yield f'<div class="card"><h3>document {_text(document)}</h3>'
    yield from _pairs(common)
    yield '<div class="completions">'
    for model, row in rows.items():
        scores = ", ".join(f"{name} {'unscored' if v is None else f'{v:.4g}'}" for name, v in row["values"].items())
        yield f"<div><h3>{_text(model)}</h3><p>{_text(scores)} {_text(row['reason'])}</p>"
        yield from _pairs({key: text for key, text in row["shown"].items() if key not in common})
        yield "</div>"
    yield "</div></div>"


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        text = str(value)
        cut = " …" if len(text) > SHOWN_CHARACTERS else ""
        yield f'<p class="soft">{_text(key)}</p><p class="text">{_text(text[:SHOWN_CHARACTERS] + cut)}</p>'
