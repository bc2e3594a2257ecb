"""Progress line of a stage: step, values, speed, elapsed time and remaining time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Pace:
    """Times a stage's steps since the stage was started or resumed.

    total: number of steps of the stage.
    done: number of steps before this start.
    clock: returns the time in seconds.
    """

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic):
        self.total, self.first, self.clock = total, done, clock
        self.start = clock()

    def line(self, step: int, values: Mapping[str, str], tokens: int = 0) -> str:
        """The line after `step`.

        values: formatted values by name.
        tokens: number of tokens trained since the start; 0 if unknown.
        """
        seconds, steps = self.clock() - self.start, step - self.first
        parts = [f"step {step}/{self.total}", *(f"{name} {value}" for name, value in values.items())]
        if tokens and seconds > 0:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        parts.append(clock_text(seconds))
        if steps > 0 and step < self.total:
            parts[-1] += f", {clock_text(seconds / steps * (self.total - step))} left"
        return "  " + "  ".join(parts)


def clock_text(seconds: float) -> str:
    """Seconds as on a clock: 0:07, 12:34, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
