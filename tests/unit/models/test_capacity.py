"""Capacity limits, recycle routing and the experts' computation.

Counts per expert are exact, no token is dropped while slots are free, and recycled tokens are uniform over free slots.
"""

from __future__ import annotations

import math

import pytest
import torch

from align.models.experts import ExpertRows, Experts, grouped_product, sorted_product
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.hunyuan.moe import Router, limit_capacity, route
from tests.near import assert_near


def counts(experts: torch.Tensor, num_experts: int) -> list[int]:
    return [int((experts == expert).sum()) for expert in range(num_experts)]


def by_hand(chosen: list[list[int]], num_experts: int, slots: int) -> list[list[int]]:
    """Dropping without recycling, as a loop: the first choices of all tokens, then their second choices."""
    taken, placed = [0] * num_experts, [[-1] * len(row) for row in chosen]
    for choice in range(len(chosen[0])):
        for token, row in enumerate(chosen):
            if taken[row[choice]] < slots:
                taken[row[choice]] += 1
                placed[token][choice] = row[choice]
    return placed


@pytest.mark.parametrize("seed", range(20))
def test_dropping_is_what_a_loop_does(seed) -> None:
    torch.manual_seed(seed)
    tokens, num_experts, top_k = int(torch.randint(1, 40, ())), int(torch.randint(2, 9, ())), 1 + seed % 2
    factor = 0.5 + 0.25 * (seed % 5)
    chosen = torch.randn(tokens, num_experts).topk(top_k).indices
    slots = math.ceil(factor * top_k * tokens / num_experts)
    placed = limit_capacity(chosen, num_experts, factor, recycle=False)
    assert placed.tolist() == by_hand(chosen.tolist(), num_experts, slots)


@pytest.mark.parametrize("factor", [1.0, 1.25, 1.5])
@pytest.mark.parametrize("top_k", [1, 2])
def test_recycling_loses_nothing_while_capacity_allows(factor, top_k) -> None:
    torch.manual_seed(1)
    skewed = torch.randn(64, 8) + torch.tensor([3.0, 2.0, 1.0, 0, 0, 0, 0, 0])
    chosen = skewed.topk(top_k).indices
    placed = limit_capacity(chosen, 8, factor, recycle=True)
    assert (placed >= 0).all()
    assert max(counts(placed, 8)) <= math.ceil(factor * top_k * 64 / 8)
    kept = limit_capacity(chosen, 8, factor, recycle=False)
    assert (placed[kept >= 0] == kept[kept >= 0]).all(), "a token that fits stays where the router sent it"
    assert (kept < 0).any()


def test_too_little_capacity_drops_exactly_the_rest() -> None:
    chosen = torch.zeros(20, 1, dtype=torch.long)
    placed = limit_capacity(chosen, 4, 0.6, recycle=True)
    assert counts(placed, 4) == [3, 3, 3, 3]
    assert int((placed < 0).sum()) == 8


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 4 / 3])
def test_a_masked_batch_has_the_capacity_of_its_tokens(factor) -> None:
    """All tokens choose expert 0 of 4, which keeps at most ceil(factor * tokens / 4) of them."""
    chosen = torch.zeros(60, 1, dtype=torch.long)
    for tokens in range(61):
        mask = torch.arange(60) < tokens
        kept = limit_capacity(chosen, 4, factor, recycle=False, mask_T=mask)
        assert counts(kept, 4) == [min(tokens, math.ceil(factor * 1 * tokens / 4)), 0, 0, 0]


def test_the_reports_example() -> None:
    """At a capacity of 2 per expert, the third token that chose expert 1 moves to an expert with a free slot."""
    chosen = torch.tensor([[1], [1], [0], [1]])
    landed = set()
    for seed in range(30):
        torch.manual_seed(seed)
        placed = limit_capacity(chosen, 4, 2.0, recycle=True)
        assert placed[:3].tolist() == [[1], [1], [0]]
        landed.add(int(placed[3, 0]))
    assert landed == {0, 2, 3}


def test_free_slots_are_drawn_uniformly() -> None:
    """40 tokens choose expert 0 and 4 choose expert 1. At a capacity of 10 per expert, experts 1, 2 and 3 have 6, 10
    and 10 free slots. Chi-square test at the 0.1 % level."""
    chosen = torch.tensor([[0]] * 40 + [[1]] * 4)
    torch.manual_seed(0)
    seen = torch.zeros(4)
    rounds = 400
    for _ in range(rounds):
        placed = limit_capacity(chosen, 4, 10 * 4 / 44, recycle=True)
        first = int(placed[10, 0])  # the first overflowing token: its slot is uniform over the 26 free slots
        if first >= 0:
            seen[first] += 1
    # 30 tokens overflow, and 26 slots are free. Slots are assigned in token order, so the first token always gets one.
    assert seen.sum() == rounds
    expected = rounds * torch.tensor([6.0, 10.0, 10.0]) / 26
    chi_square = ((seen[1:] - expected) ** 2 / expected).sum().item()
    assert seen[0] == 0
    assert chi_square < 13.8  # 2 degrees of freedom


def test_the_seed_decides() -> None:
    chosen = torch.randint(0, 2, (50, 1))
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(limit_capacity(chosen, 8, 1.0, recycle=True).tolist())
    assert results[0] == results[1] != results[2]


def test_padding_takes_no_slot() -> None:
    chosen = torch.tensor([[0]] * 6 + [[0], [1], [2], [3]])
    mask = torch.tensor([0] * 6 + [1] * 4)
    placed = limit_capacity(chosen, 4, 1.0, recycle=True, mask_T=mask)
    assert placed.flatten().tolist() == [-1] * 6 + [0, 1, 2, 3]


def test_a_recycled_token_is_weighted_by_its_probability_for_the_new_expert() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5], [3.0, 0.0, 1.0]])
    moved = route(logits, 1, lambda chosen: torch.tensor([[1], [2]]))
    probabilities = logits.softmax(-1)
    assert moved.weights_Tk.flatten().tolist() == pytest.approx(
        [probabilities[0, 1].item(), probabilities[1, 2].item()]
    )
    assert moved.chosen_Tk.flatten().tolist() == [0, 0]
    to_the_first = route(logits.flip(1), 1, lambda chosen: torch.zeros_like(chosen))
    assert to_the_first.chosen_Tk.flatten().tolist() == [2, 2]
    assert_near(to_the_first.weights_Tk[:, 0], probabilities[:, 2])
    pair = route(logits, 2, lambda chosen: torch.tensor([[0, 2], [0, -1]]))
    first = probabilities[0, [0, 2]] / probabilities[0, [0, 2]].sum()
    assert_near(pair.weights_Tk[0], first)
    torch.testing.assert_close(pair.weights_Tk[1, 0], probabilities[1, 0] / probabilities[1, [0, 2]].sum())


def test_a_dropped_token_gets_nothing_and_the_others_what_they_had() -> None:
    torch.manual_seed(0)
    experts = Experts(3, hidden_size=8, width=6, activation="silu")
    torch.nn.init.normal_(experts.gate_up_proj)
    torch.nn.init.normal_(experts.down_proj)
    hidden, weights = torch.randn(5, 8), torch.rand(5, 1)
    chosen = torch.tensor([[0], [2], [2], [0], [1]])
    whole = experts(hidden, chosen, weights)
    some = chosen.clone()
    some[2] = -1
    part = experts(hidden, some, weights)
    assert part[2].abs().max() == 0
    torch.testing.assert_close(part[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


def test_a_grouped_product_is_that_of_the_loop() -> None:
    torch.manual_seed(0)
    weights, factors = torch.randn(3, 8, 16, requires_grad=True), torch.randn(9, 8)
    division = ExpertRows(torch.tensor([4, 4, 7], dtype=torch.int32), total=9)
    rows = torch.randn(9, 16, requires_grad=True)
    results = []
    for way in (sorted_product, grouped_product):
        weights.grad = rows.grad = None
        output = way(rows, weights, division)
        (output * factors).sum().backward()
        results.append((output.detach(), rows.grad, weights.grad))
    expected = torch.cat([rows[:4] @ weights[0].T, rows[4:7] @ weights[2].T, torch.zeros(2, 8)])
    assert_near(results[0][0], expected.detach())
    for loop, grouped in zip(*results, strict=True):
        assert_near(grouped, loop)


def test_a_grouped_product_of_rows_that_all_have_an_expert() -> None:
    torch.manual_seed(0)
    weights, rows = torch.randn(3, 8, 16), torch.randn(7, 16)
    division = ExpertRows(torch.tensor([4, 4, 7], dtype=torch.int32), total=7, complete=True)
    assert division.counts == [4, 0, 3, 0]
    assert_near(grouped_product(rows, weights, division), torch.cat([rows[:4] @ weights[0].T, rows[4:] @ weights[2].T]))


def test_frozen_experts_and_frozen_tokens_have_no_gradient() -> None:
    torch.manual_seed(0)
    experts = Experts(3, hidden_size=16, width=8, activation="silu")
    chosen, weights = torch.tensor([[0, 2], [2, 1], [0, 1]]), torch.rand(3, 2)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(3, 16, requires_grad=True)
    experts(hidden, chosen, weights).sum().backward()
    wanted, hidden.grad = hidden.grad, None
    experts.zero_grad()
    experts.requires_grad_(False)
    experts(hidden, chosen, weights).sum().backward()
    assert torch.equal(hidden.grad, wanted)
    assert experts.down_proj.grad is None
    experts.down_proj.requires_grad_(True)
    experts(hidden.detach(), chosen, weights).sum().backward()
    assert experts.down_proj.grad.abs().sum() > 0


def test_autocast_computes_the_experts_in_its_type() -> None:
    torch.manual_seed(0)
    experts = Experts(4, hidden_size=64, width=32, activation="silu")
    chosen, weights = torch.randint(0, 4, (20, 2)), torch.rand(20, 2)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden = torch.randn(20, 64, requires_grad=True)
    results = []
    for enabled in (False, True):
        hidden.grad = None
        experts.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = experts(hidden, chosen, weights)
        output.float().square().sum().backward()
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert experts.down_proj.grad.dtype == hidden.grad.dtype == torch.float32
        results.append((output.float(), hidden.grad, experts.down_proj.grad.clone()))
    for full, half in zip(*results):
        assert 0 < (half - full).norm() / full.norm() < 0.02


def tiny(**changes) -> HunYuanForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return HunYuanForCausalLM(HunYuanConfig(**(sizes | heads | changes)))


def test_capacity_limits_training_only() -> None:
    ids = torch.randint(0, 64, (4, 16))
    limited = tiny(moe_drop_tokens=True, moe_random_routing_dropped_token=True, capacity_factor=1.0)
    free = tiny()
    torch.testing.assert_close(limited.eval()(ids).logits, free.eval()(ids).logits)
    report = limited.train()(ids, output_router_logits=True).router
    assert report.recycled > 0
    assert report.dropped == 0
    assert max(load.max() for load in report.load) > 0.25, (
        "the reported load counts the router's choices, before recycling"
    )
    assert free.train()(ids, output_router_logits=True).router.recycled == 0
    dropping = tiny(moe_drop_tokens=True, capacity_factor=1.0).train()(ids, output_router_logits=True).router
    assert dropping.dropped > 0
    assert dropping.recycled == 0


def test_every_layer_may_have_its_own_capacity() -> None:
    model = tiny(moe_drop_tokens=True, capacity_factor=[1.0, 4.0])
    assert [layer.mlp.gate.capacity_factor for layer in model.model.layers] == [1.0, 4.0]


def test_activation_checkpointing_draws_the_same_slots() -> None:
    ids = torch.randint(0, 64, (4, 16))
    gradients = []
    for checkpointing in (False, True):
        model = tiny(moe_drop_tokens=True, moe_random_routing_dropped_token=True, hidden_dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model(ids, labels=ids, output_router_logits=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "experts" in name or "gate" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="use_reentrant"):
        tiny().gradient_checkpointing_enable({"use_reentrant": True})


def test_the_router_limits_itself_only_in_training() -> None:
    config = HunYuanConfig(
        hidden_size=8, num_experts=4, num_attention_heads=2, moe_drop_tokens=True, capacity_factor=0.5
    )
    router = Router(config, 0)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(16, 8)
    assert (router.eval()(hidden).experts_Tk >= 0).all()
    assert (router.train()(hidden).experts_Tk < 0).any()
