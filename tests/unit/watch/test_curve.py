"""Decimation: no extreme is lost, however the points arrive, and memory does not grow with the run."""

from __future__ import annotations

import numpy as np
import pytest

from align.eval.report.smoothing import smoothing_window
from align.watch.curve import BLOCKS, Curve


def made(steps: np.ndarray, values: np.ndarray, parts: int = 1) -> Curve:
    curve = Curve()
    for chunk in np.array_split(np.arange(len(steps)), parts):
        curve.extend(steps[chunk].tolist(), values[chunk].tolist())
    return curve


@pytest.mark.parametrize("count", [1, 2, BLOCKS, 2 * BLOCKS, 2 * BLOCKS + 1, 3001, 100_000])
def test_extremes_first_and_last_points_stay(count: int) -> None:
    steps, values = np.arange(1, count + 1), np.random.default_rng(count).normal(size=count)
    drawn = made(steps, values).drawn()
    assert len(drawn.steps) <= 2 * (2 * BLOCKS + 2)
    assert (np.diff(drawn.steps) > 0).all()
    np.testing.assert_array_equal(drawn.values, values[drawn.steps.astype(int) - 1])  # points that were logged
    assert {values.min(), values.max(), values[0], values[-1]} <= set(drawn.values.tolist())


def test_a_single_spike_among_100_000_steps_is_drawn_at_its_step() -> None:
    values = np.ones(100_000)
    values[71_233] = 9.0
    drawn = made(np.arange(100_000), values, parts=37).drawn()
    assert drawn.values.max() == 9.0
    assert drawn.steps[drawn.values.argmax()] == 71_233


@pytest.mark.parametrize("parts", [2, 7, 1000])
def test_the_curve_does_not_depend_on_how_its_points_arrive(parts: int) -> None:
    steps, values = np.arange(5000) * 3, np.random.default_rng(0).normal(size=5000)
    at_once, in_parts = made(steps, values).drawn(), made(steps, values, parts).drawn()
    for one, other in ((at_once.steps, in_parts.steps), (at_once.values, in_parts.values)):
        np.testing.assert_array_equal(one, other)
    assert at_once.window == in_parts.window
    assert at_once.smooth is not None
    assert in_parts.smooth is not None
    np.testing.assert_allclose(at_once.smooth[1], in_parts.smooth[1])


def test_a_short_curve_is_drawn_whole_with_the_reports_running_mean() -> None:
    steps, values = np.arange(200), np.random.default_rng(0).normal(size=200)
    drawn = made(steps, values).drawn()
    np.testing.assert_array_equal(drawn.values, values)
    assert drawn.window == 10
    assert drawn.smooth is not None
    expected = [values[max(0, place - 9) : place + 1].mean() for place in range(200)]
    np.testing.assert_allclose(drawn.smooth[1], expected)


def test_the_running_mean_of_a_long_curve_follows_it() -> None:
    """A sine with noise; the mean over the last twentieth lags by half of that."""
    steps = np.arange(100_000)
    trend = np.sin(steps / 30_000)
    drawn = made(steps, trend + np.random.default_rng(0).normal(size=steps.size)).drawn()
    assert drawn.window == 5000
    assert drawn.smooth is not None
    x, y = drawn.smooth
    later = x > 5000
    np.testing.assert_allclose(y[later], np.sin((x[later] - 2500) / 30_000), atol=0.06)


@pytest.mark.parametrize(("count", "travel", "window"), [(59, 100, 0), (60, 100, 5), (60, 2.9, 0), (400, 100, 20)])
def test_when_a_curve_gets_a_running_mean(count: int, travel: float, window: int) -> None:
    assert smoothing_window(count, travel, 1.0) == window
    assert smoothing_window(count, travel, 0.0) == 0


def test_a_step_that_is_logged_twice_has_its_later_value() -> None:
    curve = Curve()
    curve.extend([1, 2, 2], [1.0, 5.0, 2.0])
    curve.extend([2, 3], [4.0, 3.0])
    curve.extend([1], [9.0])  # before the last step
    drawn = curve.drawn()
    assert drawn.steps.tolist() == [1, 2, 3]
    assert drawn.values.tolist() == [1.0, 4.0, 3.0]


def test_values_that_are_not_finite_are_counted_and_not_drawn() -> None:
    curve = Curve()
    curve.extend([1, 2, 3, 4], [1.0, float("nan"), float("inf"), 2.0])
    curve.extend([5], [float("-inf")])
    assert curve.not_finite == 3
    assert curve.drawn().values.tolist() == [1.0, 2.0]
    assert curve.count == 2


def test_a_curve_without_finite_values_draws_nothing() -> None:
    curve = Curve()
    curve.extend([1], [float("nan")])
    assert curve.drawn().values.size == 0


def test_memory_does_not_grow_with_the_run() -> None:
    def size(count: int) -> int:
        curve = made(np.arange(count), np.random.default_rng(0).normal(size=count), parts=50)
        return sum(value.nbytes for value in vars(curve).values() if isinstance(value, np.ndarray))

    assert size(400_000) < 2 * size(10_000)
