"""`report_routing` and the table of routed experts against hand-computed values."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from align.models.routing import RouterReport, Routing, choices_of_layers, report_routing

# Layer A: 4 tokens, 2 experts, k = 1, router probabilities 3/4 and 1/4. Layer B: even probabilities.
THIRD = math.log(3.0)
LAYER_A = Routing(
    logits_TE=torch.tensor([[THIRD, 0.0], [THIRD, 0.0], [THIRD, 0.0], [0.0, THIRD]]),
    chosen_Tk=torch.tensor([[0], [0], [0], [1]]),
    experts_Tk=torch.tensor([[0], [1], [-1], [1]]),
    weights_Tk=torch.ones(4, 1),
)
LAYER_B = Routing(
    logits_TE=torch.zeros(4, 2),
    chosen_Tk=torch.tensor([[0], [1], [0], [1]]),
    experts_Tk=torch.tensor([[0], [1], [0], [1]]),
    weights_Tk=torch.ones(4, 1),
)


def test_every_number_of_a_report() -> None:
    report = report_routing([LAYER_A, LAYER_B], torch.ones(4))
    # A: mean probabilities (10/16, 6/16), load (3/4, 1/4), so 2 * (30 + 6) / 64. B: 2 * (1/4 + 1/4) = 1.
    assert report.balance_loss.item() == pytest.approx((2 * 36 / 64 + 1) / 2, rel=1e-6)
    # The z-loss is the square of log(sum(exp(logits))), which is log 4 in layer A and log 2 in layer B.
    assert report.z_loss.item() == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2, rel=1e-6)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert report.entropy.item() == pytest.approx((entropy + math.log(2)) / 2, rel=1e-6)
    assert [load.tolist() for load in report.load] == [[0.75, 0.25], [0.5, 0.5]]
    assert report.recycled.item() == report.dropped.item() == pytest.approx(1 / 8)
    metrics = {name: value.item() for name, value in report.metrics().items()}
    assert metrics["expert_load_max"] == pytest.approx((1.5 + 1.0) / 2)
    assert metrics["recycled_share"] == metrics["dropped_share"] == pytest.approx(1 / 8)
    assert (metrics["aux_loss"], metrics["router_z_loss"]) == (report.balance_loss.item(), report.z_loss.item())
    assert metrics["router_entropy"] == report.entropy.item()


def test_padding_does_not_count() -> None:
    """Without the third token nothing is dropped in layer A, and one of three assignments is recycled."""
    report = report_routing([LAYER_A], torch.tensor([1, 1, 0, 1]))
    assert report.dropped.item() == 0
    assert report.recycled.item() == pytest.approx(1 / 3)
    assert report.load[0].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_shares_are_of_assignments_not_of_tokens() -> None:
    two = Routing(torch.zeros(2, 3), torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, -1], [1, 0]]), torch.ones(2, 2))
    report = report_routing([two], torch.ones(2))
    assert report.dropped.item() == report.recycled.item() == pytest.approx(1 / 4)


def test_a_batch_of_padding_gives_zeros() -> None:
    report = report_routing([LAYER_A], torch.zeros(4))
    assert report.dropped.item() == report.recycled.item() == 0


def test_the_loss_weights_both_terms() -> None:
    zero = torch.tensor(0.0)
    report = RouterReport(torch.tensor(3.0), torch.tensor(5.0), (zero,), zero, zero, zero)
    assert report.loss(SimpleNamespace(router_aux_loss_coef=0.01, router_z_loss_coef=0.1)).item() == pytest.approx(0.53)


def test_the_table_of_routed_experts() -> None:
    """A dense layer has -1 throughout; a layer with a smaller k has -1 beyond its own k."""
    table = choices_of_layers(
        [
            None,
            Routing(torch.zeros(2, 3), torch.tensor([[0, 2], [1, 0]]), torch.zeros(2, 2), torch.zeros(2, 2)),
            Routing(torch.zeros(2, 3), torch.tensor([[1], [2]]), torch.zeros(2, 1), torch.zeros(2, 1)),
        ]
    )
    assert table.dtype == torch.int16
    assert table.tolist() == [[[-1, -1], [0, 2], [1, -1]], [[-1, -1], [1, 0], [2, -1]]]
