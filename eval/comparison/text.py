"""A comparison for a terminal: means, differences from the first side, and settings that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from align.eval.report.formatting import NOTHING, interval, mark, mean, number
from align.eval.report.text_table import text_table, wrapped

SETTINGS = 30
"""Settings that the terminal shows; the page shows all."""


def comparison_lines(comparison: Mapping[str, Any], width: int | None = None) -> Iterator[str]:
    """The lines of a comparison of `compare_sides`. width: of the terminal; None: lines of any length."""
    names = [side["name"] for side in comparison["sides"]]
    rows = comparison["metrics"]
    if rows:
        cells = [[row["label"], *(_mean(row["sides"].get(name)) for name in names)] for row in rows]
        yield from (*text_table([["metric", *names], *cells], width), "")
    differences = [
        [
            row["label"],
            f"{d['side']} − {d['against']}",
            f"{number(d['mean'], signed=True)} {interval(d)} {mark(d)}".strip(),
            number(d["p_value"]),
            number(d["detectable"]),
            number(d["changed"]),
            number(d["n"]),
        ]
        for row in rows
        for d in row["differences"]
    ]
    if differences:
        head = ["metric", "sides", "difference", "p (Holm)", "detectable", "changed", "n"]
        yield from (*text_table([head, *differences], width), "")
    if comparison["figures"]:
        cells = [[row["label"], *(_mean(row["sides"].get(name)) for name in names)] for row in comparison["figures"]]
        yield from (*text_table([["bias and calibration", *names], *cells], width), "")
    if comparison["final"]:
        cells = [
            [f"{row['stage']}: {row['label']}" if row["stage"] else row["label"]]
            + [number(row["values"].get(name)) for name in names]
            for row in comparison["final"]
        ]
        yield from (*text_table([["last value of the training", *names], *cells], width), "")
    settings = comparison["settings"]
    if settings:
        cells = [[row["key"], *(shown(row["values"], name) for name in names)] for row in settings[:SETTINGS]]
        yield from text_table([["setting", *names], *cells], width)
        if len(settings) > SETTINGS:
            yield f"and {len(settings) - SETTINGS} more settings, on the page"
        yield ""
    if comparison["equal"]:
        yield from wrapped(f"the same in all: {', '.join(comparison['equal'])}", width)
    for note in comparison["notes"]:
        yield from wrapped(f"note: {note}", width)


def shown(values: Mapping[str, Any], name: str) -> str:
    """A setting of one side."""
    if name not in values:
        return NOTHING
    value = values[name]
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _mean(cell: dict[str, Any] | None) -> str:
    return f"{mean(cell)} {interval(cell)}".rstrip() if cell else NOTHING
