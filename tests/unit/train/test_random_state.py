"""Random states are those from before the block, also if it fails."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from align.train.random_state import preserved_random_state


def draws() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def draw_and_fail() -> None:
    with preserved_random_state():
        draws()
        raise KeyError


def test_what_is_drawn_later_does_not_depend_on_the_block() -> None:
    expected = []
    for blocks in (0, 1, 2):
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)
        if blocks:
            with preserved_random_state():
                draws()
        if blocks == 2:
            with pytest.raises(KeyError):
                draw_and_fail()
        expected.append(draws())
    assert expected[0] == expected[1] == expected[2]
