"""Comparison of tensors with a tolerance that follows their size and type."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(found: Tensor, expected: Tensor, units: float = 256) -> None:
    """Fail if an element differs by more than `units` machine epsilons of `found`'s dtype times the largest expected
    value.

    For float32, 256 epsilons are 3e-5. Rounding stays below this tolerance with any number of threads; an error of one
    percent in a typical element does not.
    """
    assert found.shape == expected.shape
    largest = expected.abs().max().item()
    tolerance = units * torch.finfo(found.dtype).eps * largest
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)
