"""AdamW against the published algorithm, and the schedule against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from align.config.parts import Optimizer
from align.train.optimizer import build_optimizer, schedule_factor


class Model(nn.Module):
    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((3, 2), 0.5, device=device))
        self.vector = nn.Parameter(torch.full((2,), -0.25, device=device))
        self.frozen = nn.Parameter(torch.ones(2, device=device), requires_grad=False)


def test_steps_are_the_published_algorithm() -> None:
    """AdamW's steps follow Loshchilov and Hutter 2019, algorithm 2, computed in Python floats."""
    settings = Optimizer(learning_rate=1e-2, weight_decay=0.1, eps=1e-5)
    model, gradients = Model(), [0.3, -2.0, 0.01, 1.5, 0.0]
    optimizer = build_optimizer(model, settings)
    expected = {"matrix": 0.5, "vector": -0.25}
    (beta1, beta2), first, second = settings.betas, 0.0, 0.0
    for number, gradient in enumerate(gradients, start=1):
        model.matrix.grad, model.vector.grad = torch.full((3, 2), gradient), torch.full((2,), gradient)
        optimizer.step()
        first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
        step = first / (1 - beta1**number) / (math.sqrt(second / (1 - beta2**number)) + settings.eps)
        expected["matrix"] *= 1 - settings.learning_rate * settings.weight_decay  # vectors do not decay
        expected = {name: value - settings.learning_rate * step for name, value in expected.items()}
        for name, value in expected.items():
            found = model.get_parameter(name).detach()
            assert found.flatten().tolist() == pytest.approx([value] * found.numel(), rel=1e-6, abs=1e-7)
    assert model.frozen.tolist() == [1, 1]


def test_parameters_on_the_meta_device_can_have_an_optimizer() -> None:
    assert len(build_optimizer(Model("meta"), Optimizer()).param_groups) == 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.norm = nn.Module(), nn.LayerNorm(2, bias=False)
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 2, 2))
        self.proj = nn.Linear(2, 2, bias=False)


def test_routed_experts_have_their_own_learning_rate_and_norms_do_not_decay() -> None:
    layer = nn.ModuleDict({"mlp": Layer()})
    settings = Optimizer(learning_rate=1e-2, expert_learning_rate_scale=0.25, weight_decay=0.1)
    groups = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in build_optimizer(layer, settings).param_groups
        for parameter in group["params"]
    }
    found = {name: groups[id(parameter)] for name, parameter in layer.named_parameters()}
    assert found == {
        "mlp.experts.gate_up_proj": (2.5e-3, 0.1),
        "mlp.norm.weight": (1e-2, 0.0),
        "mlp.proj.weight": (1e-2, 0.1),
    }


def test_b_factors_of_adapters_have_their_own_learning_rate() -> None:
    """LoRA+ (Hayou et al. 2024). Factors of experts have both ratios."""
    names = [
        "q_proj.lora_A.default",
        "q_proj.lora_B.default",
        "mlp.experts.lora_A.default",
        "mlp.experts.lora_B.default",
    ]
    model = nn.Module()
    for name in names:
        parent = model
        for part in f"{name}.weight".split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.weight = nn.Parameter(torch.zeros(2, 2))
    settings = Optimizer(learning_rate=1e-3, expert_learning_rate_scale=0.5, lora_b_learning_rate_scale=16.0)
    rates = {id(p): group["lr"] for group in build_optimizer(model, settings).param_groups for p in group["params"]}
    found = [rates[id(model.get_parameter(f"{name}.weight"))] for name in names]
    assert found == pytest.approx([1e-3, 1.6e-2, 5e-4, 8e-3])


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 2, 1, 1, 1, 1, 1]),
        ("linear", [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1 / 2, 1, 1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_schedule_warms_up_and_decays(schedule: str, factors: list[float]) -> None:
    settings = Optimizer(schedule=schedule, warmup_fraction=0.3)  # 2 of 6 steps, rounded up
    assert [schedule_factor(step, 6, settings) for step in range(6)] == pytest.approx(factors, rel=1e-12)
