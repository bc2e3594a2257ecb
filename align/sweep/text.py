"""A sweep's report as Markdown and for a terminal, from the content of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.eval.report.formatting import NOTHING, interval, number
from align.eval.report.text_table import text_table, wrapped


def intervals_line(content: Mapping[str, Any]) -> str:
    """Explanation of the intervals and differences in the table of points."""
    over = f"{content['seeds']} seeds" if content["seeds"] > 1 else "documents of one run"
    return (
        f"Means with 95 % intervals over {over}. Difference: best minus this setting, paired by "
        f"{'seed' if content['seeds'] > 1 else 'document'}; the intervals of all differences hold together with 95 % "
        "confidence (Bonferroni)."
    )


def point_rows(content: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) of the table of points: label, best point minus this one, and a cell per metric."""
    metrics = content["metrics"]
    differences = {difference["point"]: difference for difference in content["differences"]}
    head = ["Setting", *(about["label"] for about in metrics.values())]
    if differences:
        head.insert(2, "Difference")
    rows = []
    for point in content["points"]:
        row: list[Any] = [point["label"], *(point["metrics"].get(key) for key in metrics)]
        if differences:
            row.insert(2, "best" if point["name"] == content["best"] else differences.get(point["name"]))
        rows.append(row)
    return head, rows


def render_markdown(content: Mapping[str, Any]) -> str:
    """The verdict and the table of points."""
    head, rows = point_rows(content)
    cells = [[_text(cell) for cell in row] for row in rows]
    lines = [f"# Sweep {content['name']}", "", f"**{content['verdict']}**", ""]
    lines += [f"- {note}" for note in content["notes"]] + ([""] if content["notes"] else [])
    if content["metrics"]:
        lines += [intervals_line(content), ""]
        lines += [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells]]
    return "\n".join(lines).rstrip() + "\n"


def sweep_lines(content: Mapping[str, Any], width: int | None = None) -> list[str]:
    """The first columns of the table of points, and the verdict. width: of the terminal; None: lines of any length."""
    head, rows = point_rows(content)
    shown = 3 if content["differences"] else 2
    cells = [[_text(cell) for cell in row[:shown]] for row in rows]
    said = [line for sentence in [content["verdict"], *content["notes"]] for line in wrapped(sentence, width)]
    return ["", *text_table([head[:shown], *cells], width), "", *said, ""]


def _text(cell: Any) -> str:
    if cell is None or isinstance(cell, str):
        return cell or NOTHING
    return f"{number(cell['mean'])} {interval(cell)}".rstrip()
