"""Routing replay: tokens go to the experts of an earlier forward pass, and the router keeps its gradient."""

from __future__ import annotations

import pytest
import torch

from align.models.forward import policy_output
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.hunyuan.moe import MoeBlock
from align.rl.complete import complete_batch
from tests.unit.rl.small import SIZES, build, settings


@pytest.mark.parametrize("top_k", [1, 2])
def test_forced_experts_are_weighted_by_the_routers_own_probabilities(top_k) -> None:
    torch.manual_seed(0)
    block = MoeBlock(HunYuanConfig(**{**SIZES, "moe_topk": top_k, "num_shared_expert": 1}), 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(1, 3, 16)
    forced = torch.tensor([[3, 0], [-1, -1], [2, 1]])[:, :top_k]
    output, _ = block(hidden, replay_Tk=forced)
    free = block(hidden)[0]
    torch.testing.assert_close(output[0, 1], free[0, 1])
    for token in (0, 2):
        x = hidden[0, token]
        chosen = forced[token].tolist()
        p = (block.gate.weight @ x).softmax(0)
        total = p[chosen].sum() if top_k > 1 else 1.0
        expected = block.shared_mlp(x)
        for expert in chosen:
            gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
            silu = gate * torch.sigmoid(gate)
            expected = expected + p[expert] / total * (block.experts.down_proj[expert] @ (silu * up))
        torch.testing.assert_close(output[0, token], expected, rtol=1e-4, atol=1e-5)
    output[0, 0].sum().backward()
    assert block.gate.weight.grad.abs().max() > 0


def test_layers_without_experts_have_minus_one_in_the_routing() -> None:
    model = HunYuanForCausalLM(HunYuanConfig(**{**SIZES, "num_experts": [1, 4], "moe_topk": [1, 2]})).eval()
    table = model.model(torch.tensor([[1, 2, 3]]), output_router_logits=True).routed_experts
    assert table.shape == (1, 3, 2, 2)
    assert (table[:, :, 0] == -1).all()
    assert (table[:, :, 1] >= 0).all()
    assert (table[..., 1, 0] != table[..., 1, 1]).all()


def test_updates_use_the_experts_of_the_forward_pass_before_them(batch) -> None:
    models = build()
    batch.score = torch.tensor([1.0, 0.0, -1.0])
    complete_batch(settings(routing_replay="trainer"), models, batch, 0.05)
    before = batch.routed_experts.clone()
    real = torch.arange(before.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        for layer in models.policy.model.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0))  # almost every token now prefers another expert
    rows = batch.rows(torch.arange(3))
    free = policy_output(models.policy.model, rows, 1.0)
    replayed = policy_output(models.policy.model, rows, 1.0, replay=True)
    assert (free.routed_experts != before)[real].any(dim=-1).float().mean() > 0.9
    assert torch.equal(replayed.routed_experts[real], before[real])
    assert (free.logprobs - replayed.logprobs).abs().max() > 1e-3
    replayed.logprobs.sum().backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in models.policy.model.model.layers)


def test_old_logprobs_use_the_experts_of_the_rollout(batch) -> None:
    models = build()
    model = models.policy.model
    batch.score = torch.tensor([1.0, 0.0, -1.0])
    free = policy_output(model, batch, 1.0)
    batch.routed_experts = (free.routed_experts + 1) % SIZES["num_experts"]
    replayed = policy_output(model, batch, 1.0, replay=True).logprobs
    stage = settings(routing_replay="rollout", rollout={"return_routing": True})
    complete_batch(stage, models, batch, 0.05)
    torch.testing.assert_close(batch.old_logprobs, replayed)
    assert (replayed - free.logprobs).abs().max() > 1e-3
