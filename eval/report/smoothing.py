"""Running means of curves: the criterion and the window, shared by reports and the live page."""

from __future__ import annotations

SMOOTH_FROM = 60
"""A rough curve with at least this many points gets a running mean."""
ROUGH = 3.0
"""A curve is rough if its total variation is at least this multiple of its range. For a monotonic curve, such as a
decaying learning rate, the ratio is 1."""


def smoothing_window(count: int, travel: float, span: float) -> int:
    """Points of the running mean of a curve; 0 for a curve that is drawn without one.

    count: number of points. travel: total variation. span: range of the values.
    """
    if count < SMOOTH_FROM or span == 0 or travel < ROUGH * span:
        return 0
    return max(5, count // 20)
