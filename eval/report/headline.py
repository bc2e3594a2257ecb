"""The table that a run prints at its end: the models of its last evaluation, one row per metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.eval.report.formatting import NOTHING, interval, mean
from align.eval.report.text_table import text_table, wrapped

INDENT = "  "


def headline(run_dir: Path, width: int | None = None) -> list[str]:
    """Lines of the table from report.json, and what the last model has gained; empty if no model was evaluated.

    width: of the terminal; None: lines of any length.
    """
    file = run_dir / "report.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not report.get("evaluations"):
        return []
    evaluation = report["evaluations"][-1]
    models, metrics = evaluation["models"], evaluation["metrics"]
    rows = [["", *models]]
    for metric in metrics:
        rows.append([metric["label"], *(_cell(metric["models"].get(model)) for model in models)])
    verdict = report["verdict"].rstrip(".").split("; ")
    gained = [line for sentence in verdict for line in wrapped(sentence, width, indent=INDENT)]
    return ["", *text_table(rows, width, indent=INDENT), "", *gained, ""]


def _cell(cell: dict[str, Any] | None) -> str:
    return f"{mean(cell)} {interval(cell)}".rstrip() if cell else NOTHING
