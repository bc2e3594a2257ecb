"""Precision of the comparisons with padded batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["float64", "float32"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Largest relative difference. For float64, everything that asks torch for float32 gets float64."""
    if request.param == "float32":
        yield 2e-6
        return
    float32 = torch.float32
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield 1e-10
    torch.set_default_dtype(float32)
