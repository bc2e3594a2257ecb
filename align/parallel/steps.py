"""Control steps: numbered, named points that all ranks of a run pass in the same order.

Each rank publishes its step in the process group's store and polls the other ranks' steps there, outside of any
collective. So the ranks can wait for hours while rank 0 samples, and still detect an error:

    within seconds         a rank is at a step with another name, or has published a failure; the process that hosts
                           the store has ended
    within LATE seconds    a rank is still at an earlier step
    within SILENT seconds  a rank has died
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch.distributed as dist

LATE = 600.0
"""Seconds that a rank waits at a step for the others to reach it."""
BEAT = 2.0
"""Seconds between two heartbeats of a rank."""
SILENT = 120.0
"""Seconds without a heartbeat after which a rank counts as dead. A C call that holds the GIL also stops heartbeats."""
PAUSES = (0.002, 0.1)
"""Shortest and longest pause between two polls, in seconds."""
LOOK = 1.0
"""Seconds between two checks of the other ranks' positions while this rank waits."""
LAST_WORDS = 5.0
"""Seconds that a rank waits before it raises an error about another rank's failure. Within this time the launcher
usually ends all ranks, so that it reports the first failure instead of its consequences."""

Phase = Literal["arrived", "working", "done", "failed", "ended"]
T = TypeVar("T")


class RankError(RuntimeError):
    """A rank is at another step than the others, is late, or has ended."""


class Position(NamedTuple):
    """The latest control step of a rank."""

    number: int
    step: str
    phase: Phase

    def __str__(self) -> str:
        return f"step {self.number} '{self.step}'"


START = Position(0, "start", "arrived")


class ControlSteps:
    """The control steps of this rank. store: shared by all ranks, and used for nothing else."""

    def __init__(self, store: dist.Store, rank: int, world: int):
        # A separate connection, because the process group may block in the original one.
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        self.rank, self.world = rank, world
        self.own = START
        self.arrivals: list[str] = []
        """Store keys of the latest steps; the value of a key counts the ranks that have reached the step."""
        self.heard = {other: (b"", time.monotonic()) for other in range(world)}
        """Last heartbeat of each rank, and when this rank saw it."""
        self.closed = threading.Event()
        self.mark("arrived")
        threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True).start()

    def enter(self, step: str, phase: Phase = "arrived") -> None:
        """Publish that this rank has reached the next step."""
        if self.own.phase == "working":
            raise RuntimeError(f"step '{step}' is for all ranks, but rank 0 alone is at work on {self.own}")
        self.own = Position(self.own.number + 1, step, phase)
        self.mark(phase)
        self.arrivals.append(f"arrived/{self.own.number}/{step}")
        self._use(lambda: self.store.add(self.arrivals[-1], 1))
        if self.rank == 0 and len(self.arrivals) > 2:  # every rank has passed the step of these keys
            self._use(lambda: self.store.delete_key(self.arrivals.pop(0)))
            self._use(lambda: self.store.delete_key(self._size_key(self.own.number - 2)))

    def mark(self, phase: Phase, size: int = 0) -> None:
        """Publish the phase of this rank's current step. size: bytes of the result that rank 0 is about to broadcast.

        The size has a key of its own. A small broadcast lets rank 0 go on to the next step before the other ranks have
        read its position.
        """
        self.own = self.own._replace(phase=phase)
        if size:
            self._use(lambda: self.store.set(self._size_key(self.own.number), str(size)))
        self._use(lambda: self.store.set(f"at/{self.rank}", json.dumps(self.own)))

    def _size_key(self, number: int) -> str:
        return f"size/{number}"

    def wait_for_all(self) -> None:
        """Return once every rank has reached this step."""
        self._wait(lambda: self.store.add(self.arrivals[-1], 0) >= self.world)

    def wait_for_rank_0(self) -> int:
        """Wait without a time limit until rank 0 has finished its work.

        Returns the size of its result in bytes; 0 if the step has no result.
        """
        self._wait(lambda: self._rank_0_is_done(self._position(0)))
        key = self._size_key(self.own.number)
        return self._use(lambda: int(self.store.get(key)) if self.store.check([key]) else 0)

    def _rank_0_is_done(self, at: Position) -> bool:
        return at.number > self.own.number or at == (self.own.number, self.own.step, "done")

    def leave(self) -> None:
        """Publish that this rank no longer needs the others. Rank 0, whose process may hold the store, returns last."""
        self._use(lambda: self.store.add("left", 1))
        if self.rank == 0:
            self._wait(lambda: self.store.add("left", 0) >= self.world)
        self.close()

    def close(self, *, failed: bool = False) -> None:
        """Stop the heartbeat. failed: also publish that this rank has ended, so that the others do not wait for it."""
        self.closed.set()
        if failed:
            with suppress(RuntimeError):  # the store may have ended as well
                self.store.set(f"at/{self.rank}", json.dumps(self.own._replace(phase="ended")))

    def _position(self, rank: int) -> Position:
        key = f"at/{rank}"
        return Position(*json.loads(self.store.get(key))) if self.store.check([key]) else START

    def _wait(self, is_over: Callable[[], bool]) -> None:
        """Poll until `is_over()`; raise `RankError` if `_check_others` finds an error meanwhile."""
        since = looked = time.monotonic()
        pause, longest = PAUSES
        while not self._use(is_over):
            now = time.monotonic()
            if now - looked >= LOOK:
                looked = now
                self._use(partial(self._check_others, late=now - since > LATE))
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _check_others(self, *, late: bool) -> None:
        others = {rank: self._position(rank) for rank in range(self.world) if rank != self.rank}
        here = f"rank {self.rank} is at {self.own}"
        for rank, other in others.items():  # checked before failures, which may follow from it
            if other.number == self.own.number and other.step != self.own.step:
                raise RankError(f"rank {rank} is at {other}; {here}")
        for rank, other in others.items():
            if other.phase in ("failed", "ended"):
                time.sleep(LAST_WORDS)
                raise RankError(f"rank {rank} has failed at {other}; {here}")
            if late and other.number < self.own.number:
                raise RankError(f"rank {rank} is still at {other} after {LATE:.0f} seconds; {here}")
            self._check_heartbeat(rank, f"the last step it reached is {other}; {here}")

    def _check_heartbeat(self, rank: int, where: str) -> None:
        key, now = f"beat/{rank}", time.monotonic()
        beat = self.store.get(key) if self.store.check([key]) else b""
        last, heard = self.heard[rank]
        if beat != last:
            self.heard[rank] = (beat, now)
        elif now - heard > SILENT:
            raise RankError(f"rank {rank} is dead: no heartbeat for {SILENT:.0f} seconds; {where}")

    def _keep_beating(self) -> None:
        count = 0
        while not self.closed.wait(BEAT):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:
                return  # the store has ended; the next control step reports it

    def _use(self, action: Callable[[], T]) -> T:
        """Use the store. A lost connection means that the process that holds the store, usually rank 0's, has ended."""
        try:
            return action()
        except dist.DistError as error:
            time.sleep(LAST_WORDS)
            reason = str(error).partition("\n")[0]
            raise RankError(f"rank 0 is gone ({reason}); rank {self.rank} is at {self.own}") from None
