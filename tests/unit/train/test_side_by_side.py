"""`side_by_side` runs two tasks at a time, returns results in order and restores the thread settings."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from align.train.side_by_side import side_by_side


@pytest.fixture(autouse=True)
def five_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


def test_two_tasks_run_concurrently_on_half_of_the_threads_each() -> None:
    meeting = threading.Barrier(2)

    def task():
        meeting.wait(timeout=30)  # raises unless both tasks run
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        first, second = side_by_side([task, task])
    assert first[0] != second[0]
    assert {first[1:], second[1:]} == {(3, False), (2, False)}  # either thread may be first
    assert torch.get_num_threads() == 5


def test_one_task_has_all_threads_and_two_on_one_thread_run_in_order() -> None:
    assert side_by_side([torch.get_num_threads]) == [5]
    torch.set_num_threads(1)
    order: list[int] = []
    side_by_side([lambda: order.append(1), lambda: order.append(2)])
    assert order == [1, 2]


def test_many_tasks_run_once_each_and_results_keep_their_order() -> None:
    done: list[int] = []

    def task(number: int) -> int:
        threading.Event().wait(0.01 * (number % 3))
        done.append(number)
        return -number

    assert side_by_side([partial(task, number) for number in range(7)]) == [-number for number in range(7)]
    assert sorted(done) == list(range(7))


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_raised_once_the_running_task_has_ended(failing) -> None:
    meeting, ended, never = threading.Barrier(2), threading.Event(), threading.Event()

    def good():
        meeting.wait(timeout=30)
        ended.wait(timeout=0.2)
        ended.set()

    def bad():
        meeting.wait(timeout=30)
        raise ArithmeticError("in one task")

    tasks = [good, good, never.set]
    tasks[failing] = bad
    with pytest.raises(ArithmeticError, match="in one task"):
        side_by_side(tasks)
    assert ended.is_set()
    assert not never.is_set()
    assert torch.get_num_threads() == 5
