"""Random states of a process, restored after work that must not change what is drawn later."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch, on the CPU and on every GPU, at the end of the block."""
    python, arrays, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
