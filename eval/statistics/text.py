"""Means and intervals as text."""

from __future__ import annotations

from align.eval.statistics.intervals import Interval
from align.eval.statistics.summary import Summary


def summary_text(summary: Summary, digits: int) -> str:
    """Mean with its interval and counts."""
    if summary.mean is None:
        return f"unknown (n 0, {summary.unscored} unscored)"
    ends = "" if summary.low is None else f" [{summary.low:.{digits}f}, {summary.high:.{digits}f}]"
    return f"{summary.mean:.{digits}f}{ends} (n {summary.n}, {summary.unscored} unscored)"


def interval_text(interval: Interval) -> str:
    """Mean with its interval; without ends that are unknown."""
    ends = "" if interval.low != interval.low else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{interval.mean:.2f}{ends}"


def percent_text(interval: Interval) -> str:
    """A share with its interval in percent; without ends that are unknown."""
    ends = "" if interval.low != interval.low else f" [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
    return f"{100 * interval.mean:.0f}{ends} %"
