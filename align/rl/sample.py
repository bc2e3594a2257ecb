"""Sample completions of the prompts.

The seed and the position in the prompt stream determine the next prompts and their sampling seed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from align.config.ppo import PpoStage
from align.data.prepare import PromptRow
from align.parallel.group import barrier, from_rank_0, is_main, rank_0_last
from align.rollout.base import Completion, RolloutEngine, SamplingSettings
from align.train.device import return_cached_memory
from align.train.learner import Learner

PROBES, PROBE_TOKENS = 4, 12
"""Completions of `RolloutSampler.probe` and their maximum length."""


@dataclass(frozen=True)
class Rollouts:
    """Completions of consecutive prompts.

    position: index of the first prompt in the prompt stream.
    rows: each completion's prompt; the `completions_per_prompt` completions of a prompt are adjacent.
    completions: one per row.
    metrics: metrics of the engine, see `GenerationReport`.
    """

    position: int
    rows: list[PromptRow]
    completions: list[Completion]
    metrics: dict[str, float] = field(default_factory=dict)


class RolloutSampler:
    """Samples completions with the rollout engine. Only rank 0 holds the engine; every rank gets the completions.

    The prompt stream repeats the prompts in epochs, each in a new random order. All ranks must make the same calls.

    position: index of the next prompt in the prompt stream.
    """

    def __init__(
        self,
        build_engine: Callable[[], RolloutEngine],
        prompts: Sequence[PromptRow],
        stage: PpoStage,
        *,
        stop_ids: Sequence[int],
        seed: int,
    ):
        self.prompts, self.stage, self.seed = prompts, stage, seed
        self.stop_ids = tuple(stop_ids)
        self.position = 0
        self._engine: RolloutEngine | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="align-rollout")
        self._pending: Future[Rollouts] | None = None
        return_cached_memory_of_all_ranks("before the rollout engine starts")
        from_rank_0("starting the rollout engine", lambda: self._start(build_engine))

    def _start(self, build_engine: Callable[[], RolloutEngine]) -> None:
        self._engine = build_engine()

    @property
    def engine(self) -> RolloutEngine:
        """The rollout engine, on rank 0."""
        assert self._engine is not None
        return self._engine

    def sample(self, completions: int | None = None) -> Rollouts:
        """Return the samples that `begin` started or `resume` restored, if any.

        Otherwise sample `completions` completions of the next prompts (default: a rollout batch).
        """
        position, sampled, metrics = from_rank_0("sampling", lambda: self._next(completions or self.stage.batch_size))
        self.position = position + len(sampled) // self.stage.completions_per_prompt
        return Rollouts(position, self._rows(position, len(sampled)), sampled, metrics)

    def begin(self) -> None:
        """Start sampling the next rollout batch in the background."""
        if is_main():
            self._pending = self._pool.submit(self._generate, self.position, self.stage.batch_size)

    def wait(self) -> None:
        """Wait for the samples that `begin` started; the next `sample` returns them."""
        from_rank_0("sampling", self._wait)

    def _wait(self) -> None:
        self.wait_for_pending()

    def wait_for_pending(self) -> Rollouts | None:
        """On rank 0: wait for the samples that `begin` started and return them, or return those that `resume` restored.

        None if there are no such samples.
        """
        return self._pending.result() if self._pending is not None else None

    def resume(self, position: int, stored: tuple[int, list[Completion]] | None) -> None:
        """Continue at `position` of the prompt stream.

        stored: on rank 0, (position, completions) of an interrupted iteration; ignored if its position differs.
        """
        self.position = position
        if stored is not None and stored[0] == position:
            done: Future[Rollouts] = Future()
            done.set_result(Rollouts(position, self._rows(position, len(stored[1])), stored[1]))
            self._pending = done

    def update_weights(self, policy: Learner, version: int) -> dict[str, float]:
        """Send the policy's weights to the engine; return the transfer's metrics on rank 0, and {} on other ranks."""
        with rank_0_last("sending the weights"):
            weights = policy.published_weights()
            if not is_main():
                deque(weights, maxlen=0)  # iterate to take part in gathering the weights
                return {}
            self.engine.update_weights(weights, version=version)
        if not policy.collective:  # gathering sharded weights again would need all ranks
            self.engine.offer_weights(policy.published_weights)
        return self.engine.last_sync.metrics() if self.engine.last_sync is not None else {}

    def probe(self) -> list[Completion]:
        """A few short completions from the current weights. The position in the prompt stream does not change."""
        rows = self._rows(0, PROBES * self.stage.completions_per_prompt)[:: self.stage.completions_per_prompt]
        sampling = SamplingSettings(
            max_new_tokens=min(PROBE_TOKENS, self.stage.rollout.max_new_tokens),
            temperature=self.stage.rollout.temperature,
            seed=self.seed,
            stop_token_ids=self.stop_ids,
        )
        prompts = [list(row.ids) for row in rows]
        return from_rank_0("self-check", lambda: [row[0] for row in self.engine.generate(prompts, sampling)])

    def sleep(self) -> None:
        """With `rollout.sleep`, release the engine's GPU memory until `wake`. All ranks wait until it is released."""
        if self.stage.rollout.sleep:
            from_rank_0("rollout engine: sleep", lambda: self.engine.sleep())

    def wake(self) -> None:
        """With `rollout.sleep`, let the engine allocate its GPU memory again.

        The engine's weights must be updated before the next sample.
        """
        if self.stage.rollout.sleep:
            return_cached_memory_of_all_ranks("before the rollout engine wakes")
            from_rank_0("rollout engine: wake", lambda: self.engine.wake())

    def close(self) -> None:
        """Wait for background sampling and close the engine."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._engine is not None:
            self._engine.close()

    def _rows(self, position: int, completions: int) -> list[PromptRow]:
        each = self.stage.completions_per_prompt
        rows = []
        for place in range(position, position + completions // each):
            epoch, index = divmod(place, len(self.prompts))
            row = self.prompts[shuffled(len(self.prompts), self.seed * 7919 + epoch)[index]]
            rows += [row] * each
        return rows

    def _next(self, completions: int) -> tuple[int, list[Completion], dict[str, float]]:
        samples = self.wait_for_pending() or self._generate(self.position, completions)
        self._pending = None
        return samples.position, samples.completions, samples.metrics

    def _generate(self, position: int, completions: int) -> Rollouts:
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
        return Rollouts(
            position,
            rows,
            [completion for group in groups for completion in group],
            report.metrics() if report is not None else {},
        )


def return_cached_memory_of_all_ranks(step: str) -> None:
    """Release the GPU memory that torch caches on every rank, before an engine allocates its own memory."""
    if torch.cuda.is_available():
        return_cached_memory()
        barrier(step)


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int) -> list[int]:
    """The numbers 0 to `count` - 1 in random order: the order of an epoch's prompts."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
