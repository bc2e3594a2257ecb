"""What is said of a run while it goes: metrics.jsonl, samples.jsonl, experiment trackers, the screen."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from align.config.ppo import PpoStage
from align.rl.complete import Metrics, known
from align.rl.panel import Panel
from align.rl.score import Round
from align.run.context import StageContext
from align.run.folder import MetricsWriter
from align.train.trackers import Trackers

PHASES = ("generate", "score", "logprobs", "update", "sync")
SAMPLES = 4
"""Completions of a round that are written to samples.jsonl."""


class Clock:
    """Seconds of each phase; `show` is told which one begins."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.show(phase)
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class RoundLog:
    """Writes every round's metrics, and shows them."""

    def __init__(self, stage: PpoStage, context: StageContext, model: Any, tokenizer: Any, *, first_step: int):
        self.stage, self.context, self.tokenizer = stage, context, tokenizer
        self.step = first_step
        kept = first_step or None
        self.metrics = MetricsWriter(context.dir / "metrics.jsonl", from_step=kept)
        self.samples = MetricsWriter(context.dir / "samples.jsonl", from_step=kept)
        self.trackers = Trackers(context, model)
        self.panel = Panel(context.name, self.stage.steps, PHASES) if sys.stdout.isatty() else None
        self.clock = Clock(self._show_phase)

    def _show_phase(self, phase: str) -> None:
        if self.panel is not None:
            self.panel.phase(self.step + 1, phase)

    def finish_round(self, whole: Round, metrics: Metrics) -> None:
        """Record a round whose weights are already with the sampler."""
        self.step += 1
        metrics = metrics | speeds(whole, self.clock.seconds)
        self.metrics.write(self.step, metrics)
        self.trackers.log(self.step, metrics)
        samples = list(self._samples(whole))
        if self.step % self.stage.sample_every == 0:
            for sample in samples:
                self.samples.write(self.step, sample)
        if self.panel is not None:
            self.panel.finish_round(self.step, metrics, samples[0])
        else:
            self.context.say(
                f"  step {self.step}/{self.stage.steps}  score {metrics['score_mean']:.3f}  kl {metrics['kl']:.4f}  "
                f"length {metrics['completion_length']:.1f}  {sum(self.clock.seconds.values()):.1f} s"
            )
        self.clock = Clock(self._show_phase)

    def _samples(self, whole: Round) -> Iterator[dict[str, Any]]:
        scores = known(whole.batch.score)
        for row, completion, score in list(zip(whole.rows, whole.completions, scores.tolist(), strict=True))[:SAMPLES]:
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            yield {
                "prompt": row.messages[-1]["content"],
                "completion": text,
                "score": score,
                "finished": completion.finished,
                "weight_version": completion.weight_version,
            }

    def close(self) -> None:
        if self.panel is not None:
            self.panel.close()
        self.trackers.close()
        self.metrics.close()
        self.samples.close()


def speeds(whole: Round, seconds: dict[str, float]) -> Metrics:
    """time/PHASE in seconds; speed/PHASE in tokens a second: sampled ones for `generate`, prompts included for the
    others; memory/peak_gib of this process (on a GPU: of its tensors)."""
    sampled, seen = whole.batch.mask.sum().item(), whole.batch.lengths.sum().item()
    found = {f"time/{phase}": round(spent, 3) for phase, spent in seconds.items()}
    for phase, spent in seconds.items():
        if phase != "sync":
            found[f"speed/{phase}"] = round((sampled if phase == "generate" else seen) / max(spent, 1e-9), 1)
    return found | {"memory/peak_gib": round(peak_bytes() / 2**30, 3)}


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
