"""The error for sources whose rows were all dropped, with a fix for each kind of reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.config.filters import Filter
from align.config.parts import Source
from align.data.report import REASONS
from align.data.rows import Row
from align.data.shapes.base import all_dropped, shown
from align.data.shapes.canonical import NOT_A_LABEL
from align.data.shapes.recognise import LABELS
from align.data.sources import describe_source
from align.data.store.examples import SourceRow, dropped_examples
from align.data.store.tokenised import TokenisedRows
from align.errors import UserError


def no_rows(
    rows: TokenisedRows, sources: Sequence[Source], length: str, filters: Mapping[str, Sequence[Filter]] | None = None
) -> UserError:
    """The error for `rows`, all of which were dropped.

    length: name of the setting that bounds a row's length.
    filters: {name of the setting: filters that dropped rows}.
    """
    names = ", ".join(describe_source(source) for source in sources)
    dropped = rows.dropped().most_common(REASONS)
    reasons = ", ".join(f"{reason}: {count:,} row{'s' * (count > 1)}" for reason, count in dropped)
    examples = dropped_examples(rows, REASONS)
    advice: dict[str, str] = {}
    for reason, _ in dropped:
        kind = _kind(reason)
        if kind not in advice:
            advice[kind] = _advice(kind, examples[reason], length, filters or {})
    return UserError(f"{names}: {all_dropped(len(rows.order))} ({reasons}). {' '.join(advice.values())}")


def _kind(reason: str) -> str:
    if "max_" in reason:
        return "length"
    if reason == NOT_A_LABEL:
        return "label"
    return "filter" if reason.startswith("filter: ") else "row"


def _advice(kind: str, example: SourceRow, length: str, filters: Mapping[str, Sequence[Filter]]) -> str:
    match kind:
        case "length":
            return f"Raise {length}."
        case "label":
            return f"Set the label to true, false, 1 or 0; {example.where} has {_labels_of(example.row)}."
        case "filter":
            named = (f"{name} ({', '.join(settings.kind for settings in used)})" for name, used in filters.items())
            return f"Relax or remove filters in {', '.join(named)}; the first dropped row is {example.where}."
        case _:
            return f"Correct the rows; the first is {example.where}."


def _labels_of(row: Row) -> str:
    return " and ".join(f"{name} '{shown(row[name])}'" for name in LABELS if row.get(name) is not None)
