"""AdamW as it is built: the textbook's arithmetic, and who is in which group."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from align.config.parts import Optimizer
from align.train.optimizer import build_optimizer


class Model(nn.Module):
    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((3, 2), 0.5, device=device))
        self.vector = nn.Parameter(torch.full((2,), -0.25, device=device))
        self.frozen = nn.Parameter(torch.ones(2, device=device), requires_grad=False)


def test_steps_are_the_published_algorithm() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in Python's floats."""
    settings = Optimizer(learning_rate=1e-2, weight_decay=0.1, eps=1e-5)
    model, gradients = Model(), [0.3, -2.0, 0.01, 1.5, 0.0]
    optimizer = build_optimizer(model, settings)
    expected = {"matrix": 0.5, "vector": -0.25}
    (beta1, beta2), first, second = settings.betas, 0.0, 0.0
    for turn, gradient in enumerate(gradients, start=1):
        model.matrix.grad, model.vector.grad = torch.full((3, 2), gradient), torch.full((2,), gradient)
        optimizer.step()
        first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
        step = first / (1 - beta1**turn) / (math.sqrt(second / (1 - beta2**turn)) + settings.eps)
        expected["matrix"] *= 1 - settings.learning_rate * settings.weight_decay  # vectors do not decay
        expected = {name: value - settings.learning_rate * step for name, value in expected.items()}
        for name, value in expected.items():
            found = model.get_parameter(name).detach()
            assert found.flatten().tolist() == pytest.approx([value] * found.numel(), rel=1e-6, abs=1e-7)
    assert model.frozen.tolist() == [1, 1]


def test_what_is_not_in_memory_yet_can_have_an_optimizer() -> None:
    assert len(build_optimizer(Model("meta"), Optimizer()).param_groups) == 2
