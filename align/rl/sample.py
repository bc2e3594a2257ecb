"""The rounds' prompts and completions: which come next depends on the seed and on a position, nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

from align.config.ppo import PpoStage
from align.data.prepare import PromptRow
from align.rollout.base import Completion, RolloutEngine, SamplingSettings


@dataclass(frozen=True)
class Draw:
    """Completions of the prompts from `position` on, `completions_per_prompt` of each behind each other."""

    position: int
    rows: list[PromptRow]
    completions: list[Completion]
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the engine: see `GenerationReport`."""


class Sampler:
    """Draws prompts in the order of shuffled epochs and has them completed.

    position: prompts drawn so far; it and the seed fix what is drawn next.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: Sequence[PromptRow],
        stage: PpoStage,
        *,
        stop_ids: Sequence[int],
        seed: int,
    ):
        self.engine, self.prompts, self.stage, self.seed = engine, prompts, stage, seed
        self.stop_ids = tuple(stop_ids)
        self.position = 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="align-rollout")
        self._pending: Future[Draw] | None = None

    def draw(self, completions: int | None = None) -> Draw:
        """The next prompts' completions (by default a round's): those begun by `begin`, else sampled now."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            drawn = pending.result()
        else:
            drawn = self._sample(self.position, completions or self.stage.batch_size)
        self.position = drawn.position + len(drawn.rows) // self.stage.completions_per_prompt
        return drawn

    def begin(self) -> None:
        """Sample the next round in the background."""
        self._pending = self._pool.submit(self._sample, self.position, self.stage.batch_size)

    def wait(self) -> Draw | None:
        """What `begin` samples, once it is there; the next `draw` still returns it."""
        return self._pending.result() if self._pending is not None else None

    def resume(self, position: int, drawn: tuple[int, list[Completion]] | None) -> None:
        """Go on at `position`; `drawn`: completions that were sampled from there before the run was interrupted."""
        self.position = position
        if drawn is not None and drawn[0] == position:
            done: Future[Draw] = Future()
            done.set_result(Draw(position, self._rows(position, len(drawn[1])), drawn[1]))
            self._pending = done

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _rows(self, position: int, completions: int) -> list[PromptRow]:
        each = self.stage.completions_per_prompt
        found = []
        for place in range(position, position + completions // each):
            epoch, index = divmod(place, len(self.prompts))
            row = self.prompts[shuffled(len(self.prompts), self.seed * 7919 + epoch)[index]]
            found += [row] * each
        return found

    def _sample(self, position: int, completions: int) -> Draw:
        rows = self._rows(position, completions)
        each = self.stage.completions_per_prompt
        sampling = SamplingSettings(
            max_new_tokens=self.stage.rollout.max_new_tokens,
            temperature=self.stage.rollout.temperature,
            seed=self.seed * 1_000_003 + position,
            stop_token_ids=self.stop_ids,
            n=each,
        )
        groups = self.engine.generate([list(row.ids) for row in rows[::each]], sampling)
        report = self.engine.last_generation
        return Draw(
            position,
            rows,
            [completion for group in groups for completion in group],
            report.metrics() if report is not None else {},
        )


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int) -> list[int]:
    """The order of an epoch's prompts."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
