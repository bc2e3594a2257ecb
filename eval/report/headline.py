"""The table that a run prints at its end: the models of its last evaluation, one row per metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.eval.report.formatting import NOTHING, interval, mean


def headline(run_dir: Path) -> list[str]:
    """Lines of the table from report.json, and what the last model has gained; empty if no model was evaluated."""
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
    return ["", *_aligned(rows), "", *(f"  {line}" for line in verdict), ""]


def _cell(cell: dict[str, Any] | None) -> str:
    return f"{mean(cell)} {interval(cell)}".rstrip() if cell else NOTHING


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
