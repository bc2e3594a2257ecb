"""Charts of the live page: the report's charts, then speed and memory, then all other metrics of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from align.eval.report.formatting import plain
from align.run.charts import CHARTS, Chart, chart, evaluation_charts, grouped
from align.run.metrics import HELD_OUT, SHARE, THROUGHPUT, TIMES, metric_info, step_axis
from align.watch.curve import Curve, Floats

TRAINING, SPEED, OTHERS = "Training", "Speed and memory", "Other metrics"
"""Groups of charts."""
SPEED_CHARTS = (
    chart("speed/train"),
    chart("time/step"),
    grouped(THROUGHPUT),
    grouped(TIMES),
    chart("memory/peak_gib"),
)


def grouped_charts(kind: str, keys: Iterable[str]) -> Iterator[tuple[str, Chart]]:
    """(group, chart) of a stage with the metrics `keys`; charts without data are omitted. kind: kind of the stage."""
    known = dict.fromkeys(keys)
    speed = {key for found in SPEED_CHARTS for key, _ in found.series}
    training = [*evaluation_charts(known), *CHARTS.get(kind, (chart("loss", held_out=True),))]
    drawn = set()
    for group, charts in ((TRAINING, training), (SPEED, SPEED_CHARTS)):
        for found in charts:
            ours = [key for key, _ in found.series if key in known]
            if ours and not (group == TRAINING and speed.issuperset(ours)):
                drawn |= {*ours, found.band, *(found.ends or ())}
                yield group, found
    for key in known:
        if key not in drawn:
            yield OTHERS, other_chart(key)


def other_chart(key: str) -> Chart:
    """The chart of a metric that no other chart shows; its title is the key if the table of metrics lacks it."""
    metric = metric_info(key)
    title = plain(key) if metric is None else metric.title_of(key.removeprefix(HELD_OUT))
    return Chart(f"{title}, held out" if metric and key.startswith(HELD_OUT) else title, ((key, title),))


def chart_data(kind: str, group: str, found: Chart, curves: Mapping[str, Curve]) -> dict[str, Any]:
    """A chart as JSON: title with unit, decimated series, and the band around the first series, if any."""
    drawn = [(label, curves[key]) for key, label in found.series if key in curves and curves[key].count]
    return {
        "group": group,
        "title": found.full_title,
        "axis": step_axis(kind),
        "share": found.unit == SHARE,
        "series": [{"label": label, **curve_data(curve)} for label, curve in drawn],
        "band": band_data(found, curves),
        "missing": sum(curves[key].not_finite for key, _ in found.series if key in curves),
    }


def curve_data(curve: Curve) -> dict[str, Any]:
    drawn = curve.drawn()
    data: dict[str, Any] = {"x": numbers(drawn.steps), "y": numbers(drawn.values), "window": drawn.window}
    if drawn.smooth is not None:
        data["smooth"] = {"x": numbers(drawn.smooth[0]), "y": numbers(drawn.smooth[1])}
    return data


def band_data(found: Chart, curves: Mapping[str, Curve]) -> dict[str, Any] | None:
    """Standard deviation or interval around a chart's first series, per block; None without one."""
    keys = [found.series[0][0], *([found.band] if found.band else found.ends or ())]
    if len(keys) == 1 or not all(key in curves and curves[key].count for key in keys):
        return None
    (steps, middle), *others = (curves[key].means() for key in keys)
    if not all(len(x) == len(steps) and (x == steps).all() for x, _ in others):
        return None
    if found.band:
        low, high = middle - others[0][1], middle + others[0][1]
        about = "one standard deviation over completions"
    else:
        low, high = others[0][1], others[1][1]
        about = "95 % interval over documents"
    return {"x": numbers(steps), "low": numbers(low), "high": numbers(high), "about": about}


def numbers(values: Floats) -> list[float]:
    """The values rounded to the digits that a chart can show."""
    return [int(value) if value == int(value) else float(f"{value:.6g}") for value in values.tolist()]
