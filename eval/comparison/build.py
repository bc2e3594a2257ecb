"""The comparison of several sides as JSON: metrics with paired differences, final metrics, settings that differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from align.errors import UserError
from align.eval.comparison.curves import curve_groups
from align.eval.comparison.sides import Key, Measured, Side
from align.eval.pairing import paired_difference
from align.eval.results import RESAMPLES
from align.eval.statistics.significance import holm
from align.eval.statistics.summary import summarize
from align.run.metrics import titled

Row = dict[str, Any]


def compare_sides(sides: Sequence[Side]) -> dict[str, Any]:
    """Compare every side with the first one. Raises `UserError` if no two share a metric.

    metrics: one row per metric that is measured on documents, with a mean and its interval per side, and the paired
    differences from the first side. The p-values of each side are adjusted by Holm's method for its number of rows.
    figures: biases and calibration on preference pairs, which are not paired. final: last values of the training stages
    that differ. settings: those that differ.
    """
    notes = [note for side in sides for note in _stale(side)]
    rows = [_row(key, sides, notes) for key in _ordered(side.measured for side in sides)]
    equal = _equal_models(rows, sides)
    rows = [row for row in rows if row["model"] not in equal]
    for side in sides[1:]:
        of_side = [d for row in rows for d in row["differences"] if d["side"] == side.name]
        for difference, adjusted in zip(of_side, holm([d["p_value"] for d in of_side])):
            difference["p_value"] = adjusted
    final = list(_final(sides))
    shared = any(row["differences"] for row in rows) or any(len(row["values"]) > 1 for row in final)
    if not shared and not equal and not curve_groups(sides):
        raise UserError(
            f"{', '.join(str(side.path) for side in sides)}: they share no metric and no scored document. Compare runs "
            "with the same stages, or evaluations of the same tasks or preference pairs."
        )
    return {
        "sides": [{"name": side.name, "kind": side.kind, "path": str(side.path)} for side in sides],
        "equal": equal,
        "metrics": rows,
        "figures": list(_figures(sides)),
        "final": [row for row in final if len(set(row["values"].values())) > 1 or len(row["values"]) < len(sides)],
        "settings": list(differing_settings(sides)),
        "notes": list(dict.fromkeys(notes)),
    }


def _stale(side: Side) -> Iterator[str]:
    for stage, reason in side.stale.items():
        yield f"{side.name}: the stage '{stage}' is stale, because {reason}"


def _ordered(mappings: Any) -> list[Any]:
    """The distinct keys of several mappings, in order of appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _row(key: Key, sides: Sequence[Side], notes: list[str]) -> Row:
    having = [side for side in sides if key in side.measured]
    about = having[0].measured[key]
    label = f"{key.model}: {about.label}" if key.model else about.label
    if len(having) < len(sides):
        notes.append(f"{label}: only {', '.join(side.name for side in having)} has it")
    cells = {side.name: _summary(side.measured[key]) for side in having}
    differences = []
    first = sides[0]
    for side in having:
        if side is first or first not in having:
            continue
        versions = [of.versions.get(key.task) for of in (first, side)]
        if versions[0] != versions[1]:
            notes.append(f"{key.task}: the versions differ ({versions[0]}; {versions[1]}), so it is not compared")
            continue
        documents = [dict(of.measured[key].documents) for of in (first, side)]
        found = paired_difference(key.task, key.metric, documents[0], documents[1], about.clusters)
        if found is None:
            notes.append(f"{label}: no document is scored in both {first.name} and {side.name}")
        else:
            values = {name: value for name, value in asdict(found).items() if name not in ("task", "metric")}
            differences.append({"side": side.name, "against": first.name, **values})
    for side in sides:
        notes += [
            f"{task}, {metric}: not a mean over documents, so it is not compared"
            for task, metric in side.unpaired
            if task == key.task
        ]
    return {**key._asdict(), "label": label, "better": about.better, "sides": cells, "differences": differences}


def _summary(measured: Measured) -> dict[str, Any]:
    documents, clusters = measured.documents, measured.clusters
    labels = None if clusters is None else [clusters[document] for document in documents]
    return summarize(list(documents.values()), resamples=RESAMPLES, seed=0, clusters=labels)._asdict()


def _equal_models(rows: Sequence[Row], sides: Sequence[Side]) -> list[str]:
    """The models of runs that have the same value on every document in all sides, such as shared parents."""
    models = dict.fromkeys(row["model"] for row in rows if row["model"])

    def is_equal(row: Row) -> bool:
        key = Key(row["model"], row["task"], row["metric"])
        documents = [side.measured[key].documents if key in side.measured else None for side in sides]
        return all(left is not None and left == right for left, right in pairwise(documents))

    return [model for model in models if all(is_equal(row) for row in rows if row["model"] == model)]


def _final(sides: Sequence[Side]) -> Iterator[Row]:
    for stage, key in _ordered(side.finals for side in sides):
        values = {side.name: side.finals[stage, key] for side in sides if (stage, key) in side.finals}
        yield {"stage": stage, "metric": key, "label": titled(key), "values": values}


def _figures(sides: Sequence[Side]) -> Iterator[Row]:
    for label in _ordered(side.figures for side in sides):
        cells = {side.name: side.figures[label]._asdict() for side in sides if label in side.figures}
        yield {"label": label, "sides": cells}


def differing_settings(sides: Sequence[Side]) -> Iterator[Row]:
    """The settings that are not the same in all sides, with the value of each side that has one.

    If sides are of several kinds, only the settings that all have are compared.
    """
    mixed = len({side.kind for side in sides}) > 1
    for key in _ordered(side.settings for side in sides):
        values = {side.name: side.settings[key] for side in sides if key in side.settings}
        if len(values) < len(sides) and mixed:
            continue
        if len(values) < len(sides) or any(left != right for left, right in pairwise(values.values())):
            yield {"key": key, "values": values}
