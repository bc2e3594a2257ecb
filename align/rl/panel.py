"""Live view of a PPO run on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from align.run.charts import CHARTS


class Panel:
    """Live view of the run's progress and of the last iteration's phases, metrics and first completion."""

    def __init__(self, name: str, steps: int, phases: Sequence[str], console: Console | None = None):
        self.name, self.steps, self.phases = name, steps, phases
        self.step, self.current = 0, ""
        self.metrics: dict[str, float] = {}
        self.sample: dict[str, Any] = {}
        self.live = Live(self, console=console, refresh_per_second=4, transient=False)
        self.live.start()

    def phase(self, step: int, phase: str) -> None:
        """Show that iteration `step` (1-based) enters a phase."""
        self.step, self.current = step, phase

    def finish_iteration(self, step: int, metrics: dict[str, float], sample: dict[str, Any]) -> None:
        """Show the results of iteration `step`."""
        self.step, self.current, self.metrics, self.sample = step, "", metrics, sample

    def close(self) -> None:
        """Stop redrawing; the last view stays on the terminal."""
        self.current = ""
        self.live.stop()

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress()]
        if self.metrics:
            parts += [self._phases(), self._numbers(), self._sample()]
        return Frame(Group(*parts), title=self.name, title_align="left")

    def _progress(self) -> RenderableType:
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        done = self.step - (1 if self.current else 0)
        label = f"step {self.step}/{self.steps}" + (f"  {self.current}" if self.current else "")
        line.add_row(label.ljust(22), ProgressBar(total=self.steps, completed=done))
        return line

    def _phases(self) -> RenderableType:
        """Table with a row per phase: seconds, speed, and a bar for the phase's share of the iteration."""
        table = Table.grid(padding=(0, 1), expand=True)
        for justify in ("left", "right", "right"):
            table.add_column(justify=justify, no_wrap=True)
        table.add_column(ratio=1)
        seconds = {phase: self.metrics.get(f"time/{phase}", 0.0) for phase in self.phases}
        total = sum(seconds.values()) or 1.0
        for phase, spent in seconds.items():
            speed = self.metrics.get(f"speed/{phase}")
            rate = f"{speed:,.0f} tokens/s" if speed is not None else ""
            table.add_row(phase, f"{spent:.1f} s", rate, ProgressBar(total=total, completed=spent))
        return table

    def _numbers(self) -> RenderableType:
        """Table of the last iteration's metrics, with one row per chart of the report."""
        table = Table.grid(padding=(0, 2))
        for chart in CHARTS["ppo"]:
            shown = [(label, self.metrics[key]) for key, label in chart.all_series if key in self.metrics]
            if shown:
                labels = ": " + ", ".join(label for label, _ in shown) if len(chart.all_series) > 1 else ""
                table.add_row(chart.title + labels, "  ".join(f"{value:.4g}" for _, value in shown), chart.unit)
        return table

    def _sample(self) -> RenderableType:
        text = Text(f"{self.sample['score']:+.2f}  {self.sample['prompt']} → {self.sample['completion']}", style="dim")
        text.truncate(400, overflow="ellipsis")
        return text
