"""Charts of a stage's metrics: in the report, and as lines of PPO's live panel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from align.run import metrics
from align.run.metrics import DURING, HELD_OUT, metric_info, with_unit


@dataclass(frozen=True)
class Chart:
    """Metrics with the same unit that are shown in one chart.

    title: title without the unit.
    series: (key, label) of each metric.
    band: key of the standard deviation around the first series; "" for none.
    ends: keys of the ends of an interval around the first series, if any.
    """

    title: str
    series: tuple[tuple[str, str], ...]
    band: str = ""
    ends: tuple[str, str] | None = None

    @property
    def all_series(self) -> tuple[tuple[str, str], ...]:
        """The series and, if there is one, the standard deviation."""
        return (*self.series, (self.band, "standard deviation")) if self.band else self.series

    @property
    def unit(self) -> str:
        metric = metric_info(self.series[0][0])
        return metric.unit if metric is not None else ""

    @property
    def full_title(self) -> str:
        return with_unit(self.title, self.unit)


def chart(key: str, *, held_out: bool = False) -> Chart:
    """Chart of one metric; with `held_out`, also of its value on held-out rows."""
    metric = metric_info(key)
    assert metric is not None, key
    series = ((key, "training"), (f"{HELD_OUT}{key}", "held out")) if held_out else ((key, metric.title),)
    return Chart(metric.title, series)


def grouped(group: metrics.MetricGroup) -> Chart:
    """Chart of several metrics."""
    return Chart(group.title, group.series, group.band)


def evaluation_charts(keys: Iterable[str]) -> list[Chart]:
    """A chart with its interval for each metric of an evaluation during training. keys: keys of metrics.jsonl."""
    names = dict.fromkeys(key for key in keys if key.startswith(DURING) and not key.endswith(("/low", "/high")))
    return [Chart(metrics.title_of(key), ((key, "mean"),), ends=(f"{key}/low", f"{key}/high")) for key in names]


def chart_keys(kind: str, keys: Iterable[str]) -> list[str]:
    """Those of `keys` that a kind of stage has charts for, in the order of the charts.

    keys: keys of metrics.jsonl.
    """
    having = list(keys)
    charts = [*evaluation_charts(having), *CHARTS.get(kind, (chart("loss", held_out=True),))]
    wanted = dict.fromkeys(key for found in charts for key, _ in found.series)
    return [key for key in wanted if key in having]


OPTIMIZER_CHARTS = (
    chart("grad_norm"),
    chart("learning_rate"),
    chart("expert_load_max"),
    chart("speed/train"),
    chart("memory/peak_gib"),
)
LANGUAGE_CHARTS = (
    chart("loss", held_out=True),
    chart("mean_token_accuracy", held_out=True),
    chart("entropy", held_out=True),
    chart("aux_loss"),
    *OPTIMIZER_CHARTS,
)
CHARTS: dict[str, tuple[Chart, ...]] = {
    "pretrain": LANGUAGE_CHARTS,
    "sft": LANGUAGE_CHARTS,
    "reward_model": (
        chart("loss", held_out=True),
        chart("accuracy", held_out=True),
        chart("margin", held_out=True),
        *OPTIMIZER_CHARTS,
    ),
    "dpo": (
        chart("loss", held_out=True),
        chart("rewards/accuracies", held_out=True),
        chart("rewards/margins", held_out=True),
        grouped(metrics.IMPLICIT_REWARDS),
        *OPTIMIZER_CHARTS,
    ),
    "kto": (
        chart("loss", held_out=True),
        chart("rewards/margins", held_out=True),
        grouped(metrics.IMPLICIT_REWARDS_OF_LABELS),
        chart("kto_kl", held_out=True),
        *OPTIMIZER_CHARTS,
    ),
    "ppo": (
        grouped(metrics.SCORE),
        grouped(metrics.POLICY_KL),
        chart("entropy"),
        chart("completion_length"),
        grouped(metrics.ENDS),
        grouped(metrics.CLIPPED),
        chart("update_kl"),
        grouped(metrics.POLICY_LOSSES),
        chart("explained_variance"),
        grouped(metrics.MISMATCH),
        chart("expert_load_max"),
        chart("memory/peak_gib"),
    ),
}
"""Charts of each kind of stage, in the report and (PPO) in the live panel."""
