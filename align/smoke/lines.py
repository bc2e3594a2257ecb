"""The lines of `align smoke`, in order, with their budgets. Does not import torch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from align.smoke.table import Check, skipped

if TYPE_CHECKING:
    from align.smoke.machine import Machine


class Line(NamedTuple):
    """A line of the table, run in a separate process.

    function: module.name under align.smoke, called as f(machine, folder) -> list[Check].
    gpu, cpu: time budget in seconds on a GPU and on two idle CPU cores; cpu None: the line needs a GPU.
    """

    number: int
    title: str
    function: str
    gpu: float
    cpu: float | None

    def run(self, machine: Machine, folder: Path) -> list[Check]:
        if self.cpu is None and not machine.has_gpu:
            return [skipped(self.title, "needs a GPU")]
        module, name = self.function.split(".")
        checks: list[Check] = getattr(import_module(f"align.smoke.{module}"), name)(machine, folder)
        return checks

    def budget(self, has_gpu: bool) -> float:
        return self.gpu if has_gpu or self.cpu is None else self.cpu

    @property
    def limit(self) -> float:
        """Seconds after which the line is killed."""
        return 5 * max(self.gpu, self.cpu or 0)


LINES = [
    Line(0, "driver, packages, imports", "installation.check", gpu=60, cpu=30),
    Line(1, "forward and backward pass against CPU fp32", "passes.compare", gpu=60, cpu=20),
    Line(2, "host waits per pass", "passes.count_waits", gpu=30, cpu=None),
    Line(3, "engine beside a trainer: sleep, wake, new weights", "engine.check", gpu=120, cpu=25),
    Line(4, "rates of the grouped products and the loss head", "rates.measure", gpu=60, cpu=15),
    Line(5, "SFT in bf16", "training.sft", gpu=180, cpu=30),
    Line(6, "the same under ZeRO-3, killed and resumed", "training.resume", gpu=240, cpu=45),
    Line(7, "GRPO with vLLM beside the trainer", "training.grpo", gpu=180, cpu=25),
    Line(8, "ZeRO-3 with sharded experts against one process", "training.several", gpu=120, cpu=35),
]
