"""Precision of the losses: they compute in at least fp32, whatever the dtype of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a loss so that bf16 and fp16 tensor arguments are converted to fp32; other arguments are unchanged.

    bf16 rounds counts above 256, and has only two to three significant digits for a difference of log-probabilities.
    """

    @wraps(function)
    def converted(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})  # type: ignore[arg-type]

    return converted


def _widened(value: object) -> object:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value  # type: ignore[attr-defined]
