"""The line of a step: speed, time so far and time left."""

from __future__ import annotations

import pytest

from align.run.pace import Pace, clock_text


def test_the_line_of_a_step_by_hand() -> None:
    """Resumed at step 20 of 100: 20 steps of 3 s each, 1,500 tokens per second, 60 steps left."""
    now = [1000.0]
    pace = Pace(100, 20, clock=lambda: now[0])
    now[0] += 60
    line = pace.line(40, {"loss": "1.2500", "learning rate": "1.0e-04"}, tokens=90_000)
    assert line == "  step 40/100  loss 1.2500  learning rate 1.0e-04  1,500 tokens/s  1:00, 3:00 left"
    now[0] += 180
    assert pace.line(100, {}, tokens=0) == "  step 100/100  4:00"


def test_before_the_first_step_there_is_no_speed() -> None:
    assert Pace(10, clock=lambda: 5.0).line(0, {"held-out loss": "2.0"}) == "  step 0/10  held-out loss 2.0  0:00"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3599.4, "59:59"), (11100, "3:05:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text
