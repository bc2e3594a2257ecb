"""Report a PPO run while it runs: metrics.jsonl, samples.jsonl, experiment trackers, the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from align.config.ppo import PpoStage
from align.data.answers import AnswerReader
from align.parallel.group import is_main
from align.rl.complete import filled
from align.rl.panel import Panel
from align.rl.score import RolloutBatch
from align.run.context import StageContext
from align.run.folder import STEPS, MetricsWriter, write_json
from align.run.metrics import PHASES
from align.run.pace import Pace
from align.train.device import peak_bytes
from align.train.trackers import Trackers

SAMPLES = 4
"""Number of completions of a rollout batch that are written to samples.jsonl."""


class Clock:
    """Seconds of each phase of an iteration; calls `show` with the name of the phase that begins."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.show(phase)
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class RunLog:
    """Writes and shows the metrics of every iteration on rank 0. The other ranks only time their phases."""

    def __init__(self, stage: PpoStage, context: StageContext, model: Any, tokenizer: Any, *, first_step: int):
        self.stage, self.context, self.tokenizer = stage, context, tokenizer
        self.step = first_step
        self.panel: Panel | None = None
        self.clock = Clock(self._show_phase)
        self.pace, self.tokens = Pace(stage.steps, first_step), 0
        if is_main():
            kept = first_step or None
            self.metrics = MetricsWriter(context.dir / "metrics.jsonl", from_step=kept)
            self.samples = MetricsWriter(context.dir / "samples.jsonl", from_step=kept)
            write_json(context.dir / STEPS, {"steps": stage.steps})
            self.trackers = Trackers(context, model, first_step=first_step)
            self.panel = Panel(context.name, self.stage.steps, PHASES) if sys.stdout.isatty() else None

    def _show_phase(self, phase: str) -> None:
        if self.panel is not None:
            self.panel.phase(self.step + 1, phase)

    def finish_iteration(self, batch: RolloutBatch, metrics: dict[str, float]) -> None:
        """Record an iteration, after the rollout engine has received the new weights."""
        self.step += 1
        if is_main():
            self._record(batch, metrics | speeds(batch, self.clock.seconds))
        self.clock = Clock(self._show_phase)

    def _record(self, batch: RolloutBatch, metrics: dict[str, float]) -> None:
        self.metrics.write(self.step, metrics)
        self.trackers.log(self.step, metrics)
        samples = list(self._samples(batch))
        if self.step % self.stage.sample_every == 0:
            for sample in samples:
                self.samples.write(self.step, sample)
        if self.panel is not None:
            self.panel.finish_iteration(self.step, metrics, samples[0])
            return
        values = {
            "score": f"{metrics['score_mean']:.3f}",
            "KL": f"{metrics['kl']:.3f}",
            "length": f"{metrics['completion_length']:.1f}",
            "memory": f"{metrics['memory/peak_gib']:.1f} GiB",
        }
        if metrics["skipped_updates"]:
            values["skipped updates"] = f"{metrics['skipped_updates']:.0f}"
        self.tokens += int(batch.experience.lengths.sum().item())
        line = self.pace.line(self.step, values, self.tokens)
        last = self.step == self.stage.steps
        (self.context.say if last or metrics["skipped_updates"] else self.context.progress)(line)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics that do not belong to an iteration."""
        if is_main():
            self.metrics.write(step, metrics)
            self.trackers.log(step, metrics)

    def _samples(self, batch: RolloutBatch) -> Iterator[dict[str, Any]]:
        scores = filled(batch.experience.score).tolist()
        reader = AnswerReader(self.tokenizer)
        for row, completion, score in list(zip(batch.rows, batch.completions, scores, strict=True))[:SAMPLES]:
            yield {
                "prompt": row.messages[-1]["content"],
                "completion": reader.transcript(completion.token_ids),
                "score": score,
                "finished": completion.finished,
                "weight_version": completion.weight_version,
            }

    def close(self) -> None:
        """Close files, trackers and the terminal view."""
        if is_main():
            if self.panel is not None:
                self.panel.close()
            self.trackers.close()
            self.metrics.close()
            self.samples.close()


def speeds(batch: RolloutBatch, seconds: dict[str, float]) -> dict[str, float]:
    """Times, speeds and memory of an iteration.

    time/PHASE: seconds.
    speed/PHASE: tokens of the batch per second. For `generate` these are the completion tokens; for `score`, `logprobs`
        and `update` the prompt and completion tokens.
    memory/peak_gib: `peak_bytes` in GiB.
    """
    sampled = batch.experience.mask.sum().item()
    every = batch.experience.lengths.sum().item()
    metrics = {f"time/{phase}": round(spent, 3) for phase, spent in seconds.items()}
    for phase, spent in seconds.items():
        if phase != "sync":
            metrics[f"speed/{phase}"] = round((sampled if phase == "generate" else every) / max(spent, 1e-9), 1)
    return metrics | {"memory/peak_gib": round(peak_bytes() / 2**30, 3)}
