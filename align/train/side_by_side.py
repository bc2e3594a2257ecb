"""Run independent tasks concurrently on the cores of one machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="side-by-side")


def side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run tasks two at a time, each with half of torch's threads; return their results in the tasks' order.

    Two concurrent passes, each on half of the cores, spend less time on thread synchronisation than two successive
    passes on all cores. In return, the activations of both passes are in memory at the same time. If torch has a single
    thread, tasks run one after another.

    Tasks must not share mutable state. They must not draw random numbers either, because the order of the draws would
    be arbitrary.
    """
    threads = torch.get_num_threads()
    if len(tasks) < 2 or threads < 2:
        return [task() for task in tasks]
    waiting = deque(enumerate(tasks))
    results: dict[int, Result] = {}
    grad = torch.is_grad_enabled()

    def take_turns(share: int) -> None:
        # In a new thread, torch's first call resets the thread count to the last one set in any thread. Make this call
        # now, so that it does not undo the next line.
        torch.get_num_threads()
        torch.set_num_threads(share)
        with torch.set_grad_enabled(grad):
            while waiting:
                try:
                    place, task = waiting.popleft()
                except IndexError:  # the other thread took the last task
                    return
                try:
                    results[place] = task()
                except BaseException:
                    waiting.clear()
                    raise

    future = _helper.submit(take_turns, threads // 2)
    try:
        take_turns(threads - threads // 2)
        future.result()
    finally:
        future.exception()  # waits for the other thread if this one failed
        torch.set_num_threads(threads)
    return [results[place] for place in range(len(tasks))]
