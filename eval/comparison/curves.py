"""Curves of several sides, by stage and metric, for common charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from align.eval.comparison.sides import Side
from align.run.charts import chart_keys


class Group(NamedTuple):
    """The stages of several sides that belong on the same charts. rows: of metrics.jsonl, by side."""

    title: str
    kind: str
    rows: dict[str, list[dict[str, Any]]]

    def keys(self) -> list[str]:
        """The metrics that at least two sides have, in the order of the report's charts."""
        having = [{key for row in rows for key in row} for rows in self.rows.values()]
        every = dict.fromkeys(key for rows in self.rows.values() for row in rows for key in row)
        return [key for key in chart_keys(self.kind, every) if sum(key in keys for keys in having) > 1]


def curve_groups(sides: Sequence[Side]) -> list[Group]:
    """The stages that at least two sides have with different results.

    Runs share the stages of the same name. If all sides are stages, those of the same kind share their charts.
    """
    by_kind = all(side.kind == "stage" for side in sides)
    found: dict[tuple[str, str], Group] = {}
    for side in sides:
        for stage, curves in side.curves.items():
            title = curves.kind if by_kind else stage
            found.setdefault((title, curves.kind), Group(title, curves.kind, {})).rows[side.name] = curves.rows
    return [group for group in found.values() if _differs(group.rows) and group.keys()]


def _differs(rows: Mapping[str, list[dict[str, Any]]]) -> bool:
    first, *others = rows.values()
    return any(other != first for other in others)
