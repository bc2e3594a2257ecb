"""Precision of the losses: whatever the type of their inputs, they compute in at least fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Convert bf16 and fp16 arguments of a loss to fp32; others are passed on.

    In bf16 a count above 256 would be rounded, and a difference of log-probabilities above 1 has two digits.
    """

    @wraps(function)
    def converted(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})  # type: ignore[arg-type]

    return converted


def _widened(value: object) -> object:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value  # type: ignore[attr-defined]
