"""Forked ranks that follow or violate the order of control steps; each writes FOLDER/SCENARIO-RANK.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from align.errors import UserError
from align.launch.processes import free_port
from align.parallel import group, steps
from align.run import interrupt

WORLD = 3
DEADLINE = 60.0
"""Seconds after which remaining ranks are killed; longer than every time limit in a scenario."""
steps.LATE, steps.SILENT, steps.BEAT, steps.LOOK, steps.LAST_WORDS = 10.0, 8.0, 0.2, 0.2, 0.3


@dataclass
class Drawn:
    """A result with a tensor."""

    name: str
    values: torch.Tensor


def skips_a_step(rank: int) -> None:
    group.barrier("load")
    if rank != 1:
        group.barrier("score")
    group.barrier("save")


def calls_another_step(rank: int) -> None:
    group.barrier("load")
    group.from_rank_0("score" if rank != 2 else "draw", lambda: time.sleep(DEADLINE))


def is_late(rank: int) -> None:
    group.barrier("load")
    if rank == 2:
        time.sleep(DEADLINE)
    group.from_rank_0("draw", lambda: time.sleep(DEADLINE))


def is_killed(rank: int) -> None:
    group.barrier("load")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.from_rank_0("draw", lambda: time.sleep(DEADLINE))


def loses_rank_0(rank: int) -> None:
    group.barrier("load")

    def die() -> None:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    group.from_rank_0("draw", die)


def has_a_bug(rank: int) -> None:
    group.from_rank_0("draw", lambda: 1 / 0)


def nests_steps(rank: int) -> None:
    group.from_rank_0("draw", lambda: group.barrier("inside"))


def gets_a_users_error(rank: int) -> None:
    def refuse() -> None:
        raise UserError("no prompts; add some.")

    group.from_rank_0("read", refuse)


def gets_results(rank: int) -> list[object]:
    def work_longer_than_the_time_limit() -> Drawn:
        time.sleep(steps.LATE + 1)
        return Drawn(f"of rank {rank}", torch.arange(3.0) + rank)

    drawn = group.from_rank_0("draw", work_longer_than_the_time_limit)
    nothing = group.from_rank_0("nothing", lambda: None)
    return [drawn.name, drawn.values.tolist(), nothing, group.is_main()]


def waits_for_rank_0_to_finish(rank: int) -> list[float]:
    with group.rank_0_last("export"):
        everywhere = torch.ones(2)
        dist.all_reduce(everywhere)
        if rank != 2:  # ranks 0 and 1 take longer than rank 2
            time.sleep(steps.LATE + 1)
    group.barrier("next")
    return everywhere.tolist()


def fails_after_the_others(rank: int) -> None:
    with group.rank_0_last("export"):
        if rank == 0:
            raise OSError("disk full")


def stops_together(rank: int) -> int:
    """Return the step after which this rank stops. Only rank 1 gets a signal."""
    with interrupt.listening():
        for step in range(100):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            if group.should_stop():
                return step
    return -1


SCENARIOS: dict[Callable[[int], object], tuple[int, ...]] = {
    skips_a_step: (),
    calls_another_step: (0,),
    is_late: (0, 2),
    is_killed: (0,),
    loses_rank_0: (),
    has_a_bug: (),
    nests_steps: (),
    gets_a_users_error: (),
    gets_results: (),
    waits_for_rank_0_to_finish: (),
    fails_after_the_others: (),
    stops_together: (),
}
"""By scenario, the ranks that hang on purpose. They are killed once the other ranks have exited."""


def run_rank(scenario: Callable[[int], object], rank: int, address: str, file: Path) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD)
    group.control_steps()
    clock = time.monotonic()
    try:
        seen = {"result": scenario(rank)}
    except Exception as error:
        seen = {"raised": f"{type(error).__name__}: {error}"}
        group.control_steps().close(failed=True)
    file.write_text(json.dumps({**seen, "seconds": time.monotonic() - clock}))
    time.sleep(1.0)  # rank 0 hosts the store, and the others still read from it
    os._exit(0)


def main(folder: Path) -> None:
    """Fork the ranks of all scenarios at once and wait for them."""
    running: list[dict[int, int]] = []  # per scenario: process ID by rank
    for scenario in SCENARIOS:
        address = f"tcp://127.0.0.1:{free_port()}"
        running.append({})
        for rank in range(WORLD):
            child = os.fork()
            if child == 0:
                run_rank(scenario, rank, address, folder / f"{scenario.__name__}-{rank}.json")
            running[-1][rank] = child
    deadline = time.monotonic() + DEADLINE
    while any(running):
        for ranks, hanging in zip(running, SCENARIOS.values(), strict=True):
            for rank in [rank for rank, child in ranks.items() if os.waitpid(child, os.WNOHANG) != (0, 0)]:
                del ranks[rank]
            if set(ranks) <= set(hanging) or time.monotonic() > deadline:
                for child in ranks.values():
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
