"""Works that share nothing they change, side by side on the cores of one machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Answer = TypeVar("Answer")

_helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="side-by-side")


def side_by_side(works: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """What each of the works returns; of several, two go at a time, with half of torch's threads each.

    Two passes on half of the cores lose less to waiting than two on all of them, one after the other. The price is that
    both passes' activations are alive at once. With one thread they do go one after the other. None
    may draw random numbers: their order would be left to chance.
    """
    threads = torch.get_num_threads()
    if len(works) < 2 or threads < 2:
        return [work() for work in works]
    waiting = deque(enumerate(works))
    answers: dict[int, Answer] = {}
    grad = torch.is_grad_enabled()

    def take_turns(share: int) -> None:
        torch.get_num_threads()  # a new thread's first question sets its number to the last one set anywhere
        torch.set_num_threads(share)
        with torch.set_grad_enabled(grad):
            while waiting:
                try:
                    place, work = waiting.popleft()
                except IndexError:  # the other thread was quicker
                    return
                try:
                    answers[place] = work()
                except BaseException:
                    waiting.clear()
                    raise

    future = _helper.submit(take_turns, threads // 2)
    try:
        take_turns(threads - threads // 2)
        future.result()
    finally:
        future.exception()  # waits for it, should this thread's work have failed
        torch.set_num_threads(threads)
    return [answers[place] for place in range(len(works))]
