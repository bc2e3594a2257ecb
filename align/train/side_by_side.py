"""Models that share nothing, at work side by side on the cores of one machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Answer = TypeVar("Answer")

_helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="side-by-side")


def side_by_side(works: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """What each of one or two works returns; two get half of torch's threads each and go at the same time.

    Two passes on half of the cores lose less to waiting than two on all of them, one after the other. The price is that
    both passes' activations are alive at once. With one thread they do go one after the other. Neither
    may draw random numbers: their order would be left to chance.
    """
    threads = torch.get_num_threads()
    if len(works) < 2 or threads < 2:
        return [work() for work in works]
    first, second = works
    grad = torch.is_grad_enabled()

    def on_half() -> Answer:
        torch.get_num_threads()  # a new thread's first question sets its number to the last one set anywhere
        torch.set_num_threads(threads // 2)
        with torch.set_grad_enabled(grad):
            return second()

    future = _helper.submit(on_half)
    try:
        torch.set_num_threads(threads - threads // 2)
        return [first(), future.result()]
    finally:
        future.exception()  # waits for it, should `first` have failed
        torch.set_num_threads(threads)
