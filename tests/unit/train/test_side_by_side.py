"""Two works at a time: that they really are, what they return, and that nothing of it is left behind."""

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


def test_two_works_go_at_the_same_time_on_half_of_the_threads_each() -> None:
    meeting = threading.Barrier(2)

    def work():
        meeting.wait(timeout=30)  # breaks unless both are here
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        first, second = side_by_side([work, work])
    assert first[0] != second[0]
    assert {first[1:], second[1:]} == {(3, False), (2, False)}  # whichever thread was first
    assert torch.get_num_threads() == 5


def test_one_work_has_all_threads_and_two_on_one_thread_take_turns() -> None:
    assert side_by_side([torch.get_num_threads]) == [5]
    torch.set_num_threads(1)
    order: list[int] = []
    side_by_side([lambda: order.append(1), lambda: order.append(2)])
    assert order == [1, 2]


def test_of_many_works_each_is_done_once_and_answers_keep_their_order() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        threading.Event().wait(0.01 * (number % 3))
        done.append(number)
        return -number

    assert side_by_side([partial(work, number) for number in range(7)]) == [-number for number in range(7)]
    assert sorted(done) == list(range(7))


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_comes_through_when_what_has_begun_is_done(failing) -> None:
    meeting, ended, never = threading.Barrier(2), threading.Event(), threading.Event()

    def good():
        meeting.wait(timeout=30)
        ended.wait(timeout=0.2)
        ended.set()

    def bad():
        meeting.wait(timeout=30)
        raise ArithmeticError("of one work")

    works = [good, good, never.set]
    works[failing] = bad
    with pytest.raises(ArithmeticError, match="of one work"):
        side_by_side(works)
    assert ended.is_set()
    assert not never.is_set()
    assert torch.get_num_threads() == 5
