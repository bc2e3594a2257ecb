"""pairs.html of `align eval --pairs`: one page without scripts or requests, from the content of pairs.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from align.eval.report.bars import COLORS, Chart, draw
from align.eval.report.formatting import NOTHING, interval, number
from align.eval.report.page import breakable, escape, page, scrolling

SIZE = 220
"""Width and height of the plane of a reliability diagram, in pixels."""
MARGIN = 48
"""Space for the labels of its axes."""
BIASES = {"length_bias": "the longer completion", "position_bias": "the completion shown first"}


class Wrong(NamedTuple):
    """A pair that a model ranks wrongly.

    row: number of its row. margin: score of the chosen completion minus that of the rejected one, below 0.
    prompt: messages, or a text.
    """

    row: int
    margin: float
    prompt: Any
    chosen: str
    rejected: str


def render_pairs(content: Mapping[str, Any], wrong: Mapping[str, Sequence[Wrong]]) -> str:
    """The page. content: that of pairs.json. wrong: the pairs to show for each model, the largest margins first."""
    models = list(content["models"])
    sections = [
        ("accuracy", "Accuracy", [*_accuracy(content, models), *_bars(content, models)]),
        ("biases", "Length and position", list(_biases(content, models))),
        ("calibration", "Calibration", list(_calibration(content, models))),
        ("agreement", "Agreement", list(_agreement(content))),
        ("wrong", "Ranked wrongly", list(_wrong(wrong, models))),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in shown)
    body = [
        f'<header><p class="soft">Reward models on preference pairs</p><h1>{escape(" · ".join(models))}</h1>',
        f"<p>{content['pairs']:,} pairs of {escape(content['source'])}</p>",
        *_dropped(content["dropped"]),
        f'<nav aria-label="Sections">{links}</nav></header><main>',
        *(f'<section id="{a}"><h2>{escape(t)}</h2>\n{chr(10).join(parts)}</section>' for a, t, parts in shown),
        "</main>",
    ]
    return page(f"Pairs: {', '.join(models)}", body)


def _dropped(dropped: Mapping[str, int]) -> Iterator[str]:
    if dropped:
        items = "".join(f"<li>{count:,} rows dropped: {escape(reason)}</li>" for reason, count in dropped.items())
        yield f'<ul class="notes box" aria-label="Notes">{items}</ul>'


def _table(label: str, heads: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """A table whose first column names the row. Cells are HTML."""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(
        f'<tr class="task"><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return scrolling(label, f'<table class="numbers"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>')


def _mean(found: Mapping[str, Any] | None) -> str:
    """A mean with its interval."""
    if found is None or found["mean"] is None:
        return NOTHING
    return f"{number(found['mean'])}<small>{interval(found)}</small>"


def _name(model: str, models: Sequence[str]) -> str:
    return f'<i class="dot m{models.index(model) % COLORS}"></i>{breakable(model)}'


def _accuracy(content: Mapping[str, Any], models: Sequence[str]) -> Iterator[str]:
    yield (
        '<p class="soft">Share of pairs in which the chosen completion has the higher score, with its 95 % interval; '
        "equal scores count half. Pairs with the same prompt are one cluster. Unscored pairs, of which a completion is "
        "longer than the model's context, are not in the mean.</p>"
    )
    rows = []
    for model in models:
        of = content["models"][model]
        accuracy, calibration = of["accuracy"], of["calibration"]
        error, loss = (
            (NOTHING, NOTHING) if calibration is None else map(number, (calibration["ece"], calibration["log_loss"]))
        )
        rows.append(
            (
                _name(model, models),
                [
                    _mean(accuracy),
                    number(of["subset_mean"]),
                    f"{accuracy['n']:,}",
                    f"{accuracy['unscored']:,}",
                    error,
                    loss,
                ],
            )
        )
    heads = ("Model", "accuracy", "mean of subsets", "pairs", "unscored", "calibration error", "log loss")
    yield _table("Accuracy", heads, rows)


def _bars(content: Mapping[str, Any], models: Sequence[str]) -> Iterator[str]:
    """Accuracy by subset."""
    names = dict.fromkeys(name for model in models for name in content["models"][model]["subsets"])
    if names:
        found = {name: {model: content["models"][model]["subsets"][name] for model in models} for name in names}
        yield from draw(Chart("By subset", list(found.items())), models)


def _biases(content: Mapping[str, Any], models: Sequence[str]) -> Iterator[str]:
    for key, kind in BIASES.items():
        rows = []
        for model in models:
            bias = content["models"][model][key]
            if bias is None:
                continue
            shown = bias["extra"]["low"] > 0 or bias["extra"]["high"] < 0
            verdict = '<span class="down">shown</span>' if shown else "not shown"
            cells = [_mean(bias[part]) for part in ("model", "labels", "extra", "right", "wrong")]
            rows.append((_name(model, models), [*cells[:3], verdict, *cells[3:], f"{bias['n']:,}"]))
        if rows:
            yield f"<h3>Preference for {kind}</h3>"
            heads = (
                "Model",
                "of the model",
                "of the labels",
                "difference",
                "bias",
                "accuracy if right",
                "accuracy if wrong",
                "pairs",
            )
            yield _table(f"Preference for {kind}", heads, rows)
    yield (
        '<p class="soft">A bias is shown if the interval of the difference excludes 0. Accuracy if right: on the pairs '
        "whose label is this completion; if wrong: on the others.</p>"
    )


def _calibration(content: Mapping[str, Any], models: Sequence[str]) -> Iterator[str]:
    found = {model: content["models"][model]["calibration"] for model in models}
    if not any(found.values()):
        return
    yield (
        '<p class="soft">The confidence of a model is sigmoid(|margin|). A point is a bin of pairs, with the 95 % '
        "interval of its accuracy; on the diagonal, confidence and accuracy are equal.</p>"
    )
    yield '<div class="figures">'
    for model, calibration in found.items():
        if calibration is not None:
            diagram = _diagram(calibration, models.index(model) % COLORS)
            yield f"<figure><h4>{_name(model, models)}</h4>{diagram}</figure>"
    yield "</div>"
    for model, calibration in found.items():
        if calibration is not None:
            rows = [
                (
                    f"{entry['low']:.2f} to {entry['high']:.2f}",
                    [number(entry["confidence"]), _mean(entry["accuracy"]), f"{entry['n']:,}"],
                )
                for entry in calibration["bins"]
            ]
            yield f"<details><summary>{escape(model)}: the bins</summary>"
            yield _table(f"Bins of {model}", ("Confidence", "mean", "accuracy", "pairs"), rows) + "</details>"


def _diagram(calibration: Mapping[str, Any], color: int) -> str:
    """Accuracy over confidence as SVG. Confidence is between 0.5 and 1, accuracy between 0 and 1."""

    def x(value: float) -> float:
        return MARGIN + 2 * (value - 0.5) * SIZE

    def y(value: float) -> float:
        return 8 + (1 - value) * SIZE

    def line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1.5, more: str = "") -> str:
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        return f'<line {ends} style="stroke:var({stroke});stroke-width:{width}" {more}/>'

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(line(x(0.5), y(tick), x(1), y(tick), "--grid", 1))
        parts.append(f'<text x="{MARGIN - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in (0.5, 0.75, 1.0):
        parts.append(f'<text x="{x(tick):.1f}" y="{SIZE + 24}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{x(0.75):.1f}" y="{SIZE + 40}" text-anchor="middle">confidence</text>')
    middle = f"12 {y(0.5):.1f}"
    parts.append(f'<text transform="translate({middle}) rotate(-90)" text-anchor="middle">accuracy</text>')
    parts.append(line(x(0.5), y(0.5), x(1), y(1), "--axis", 1.5, 'stroke-dasharray="4 4"'))
    for entry in calibration["bins"]:
        accuracy, across = entry["accuracy"], x(entry["confidence"])
        parts.append(line(across, y(accuracy["low"]), across, y(accuracy["high"]), "--ink"))
        radius = 3 + min(5.0, entry["n"] ** 0.5 / 4)
        parts.append(
            f'<circle cx="{across:.1f}" cy="{y(accuracy["mean"]):.1f}" r="{radius:.1f}" style="fill:var(--m{color})"/>'
        )
    width, height = MARGIN + SIZE + 14, SIZE + 48
    style = "font:11px system-ui,sans-serif;fill:var(--tick)"
    label = f"Reliability diagram, calibration error {calibration['ece']:.3f}"
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} style="{style}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _agreement(content: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for names, found in content["agreement"].items():
        if found is None:
            rows.append((breakable(names), ["no pair in common", NOTHING, NOTHING, NOTHING, "0"]))
            continue
        cells = [
            _mean(found["same"]),
            number(found["kappa"]),
            _mean(found["difference"]),
            number(found["test"]["p_value"]),
        ]
        rows.append((breakable(names), [*cells, f"{found['n']:,}"]))
    if rows:
        heads = ("Models", "same preference", "kappa", "accuracy of the first minus the second", "p", "pairs")
        yield _table("Agreement", heads, rows)


def _wrong(wrong: Mapping[str, Sequence[Wrong]], models: Sequence[str]) -> Iterator[str]:
    for model in models:
        if not wrong.get(model):
            continue
        many = len(wrong[model])
        yield f"<details><summary>{escape(model)}: the {many} largest wrong margins</summary>"
        for pair in wrong[model]:
            yield f'<div class="card"><h3>row {pair.row}, margin {number(pair.margin)}</h3>'
            yield f'<p class="text prompt" dir="auto" tabindex="0">{escape(pair.prompt)}</p><div class="completions">'
            for title, text in (("chosen", pair.chosen), ("rejected, which the model prefers", pair.rejected)):
                yield f'<div><h3>{title}</h3><p class="text" dir="auto" tabindex="0">{escape(text)}</p></div>'
            yield "</div></div>"
        yield "</details>"
