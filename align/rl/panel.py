"""The live view of a run on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("score", ("score_mean", "score_std")),
    ("KL to reference (k1, k3)", ("kl", "kl_k3")),
    ("entropy", ("entropy",)),
    ("completion length", ("completion_length",)),
    ("ended, cut", ("eos_rate", "truncated_share")),
    ("clipped: policy, value", ("clip_fraction", "value_clip_fraction")),
    ("KL of the update", ("update_kl",)),
    ("value loss, explained variance", ("value_loss", "explained_variance")),
    ("mismatch mean, max", ("mismatch_mean", "mismatch_max")),
    ("busiest expert", ("expert_load_max",)),
    ("peak memory GiB", ("memory/peak_gib",)),
)
"""Label and metrics of a line; metrics that a run does not have are left out, and a line without any too."""


class Panel:
    """Progress, the last round's phases and metrics, and one of its completions; redrawn in place."""

    def __init__(self, name: str, steps: int, phases: Sequence[str], console: Console | None = None):
        self.name, self.steps, self.phases = name, steps, phases
        self.step, self.current = 0, ""
        self.metrics: dict[str, float] = {}
        self.sample: dict[str, Any] = {}
        self.live = Live(self, console=console, refresh_per_second=4, transient=False)
        self.live.start()

    def phase(self, step: int, phase: str) -> None:
        """Round `step` (from 1) enters a phase."""
        self.step, self.current = step, phase

    def finish_round(self, step: int, metrics: dict[str, float], sample: dict[str, Any]) -> None:
        self.step, self.current, self.metrics, self.sample = step, "", metrics, sample

    def close(self) -> None:
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
        """A bar for each phase, as long as its share of the round."""
        table = Table.grid(padding=(0, 1), expand=True)
        for justify in ("left", "right", "right"):
            table.add_column(justify=justify, no_wrap=True)
        table.add_column(ratio=1)
        seconds = {phase: self.metrics.get(f"time/{phase}", 0.0) for phase in self.phases}
        whole = sum(seconds.values()) or 1.0
        for phase, spent in seconds.items():
            speed = self.metrics.get(f"speed/{phase}")
            rate = f"{speed:,.0f} tokens/s" if speed is not None else ""
            table.add_row(phase, f"{spent:.1f} s", rate, ProgressBar(total=whole, completed=spent))
        return table

    def _numbers(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for label, names in ROWS:
            values = [f"{self.metrics[name]:.4g}" for name in names if name in self.metrics]
            if values:
                table.add_row(label, "  ".join(values))
        return table

    def _sample(self) -> RenderableType:
        text = Text(f"{self.sample['score']:+.2f}  {self.sample['prompt']} → {self.sample['completion']}", style="dim")
        text.truncate(400, overflow="ellipsis")
        return text
