"""Routed experts in vLLM with adapters equal a loop over tokens with merged weights, also when sharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")
from types import SimpleNamespace

from align.models.hunyuan import HunYuanConfig, vllm_experts
from align.models.hunyuan.vllm_experts import DOWN, GATE_UP, Experts

HIDDEN, WIDTH, EXPERTS, TOP, RANK, SLOTS = 32, 64, 4, 2, 3, 5
Factors = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(params=[True, False], ids=["kernel", "without the kernel"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        current = vllm_experts.has_fused_experts(config(), WIDTH)
        if not current:
            pytest.skip("vLLM has no kernel of routed experts here")
    else:
        monkeypatch.setattr(vllm_experts, "has_fused_experts", lambda *_: False)
    return bool(request.param)


def config() -> HunYuanConfig:
    return HunYuanConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
    )


def make(monkeypatch: pytest.MonkeyPatch, weights: dict[str, Tensor], rank: int = 0, ranks: int = 1) -> Experts:
    """One rank's experts with room for adapters."""
    lora = SimpleNamespace(max_loras=SLOTS, lora_dtype=torch.float32)
    monkeypatch.setattr(vllm_experts, "get_current_vllm_config", lambda: SimpleNamespace(lora_config=lora))
    monkeypatch.setattr(vllm_experts, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(vllm_experts, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(vllm_experts, "tensor_model_parallel_all_reduce", lambda x: x)
    experts = Experts(config(), 0)
    for projection, stack in weights.items():
        for number, matrix in enumerate(stack):
            experts.load(number, projection, matrix)
    return experts


def random_weights() -> dict[str, Tensor]:
    shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    return {name: torch.randn(EXPERTS, *shape) * 0.3 for name, shape in shapes.items()}


def random_adapter() -> Factors:
    """PEFT's factors of both stacks."""
    return {
        GATE_UP: (torch.randn(EXPERTS * RANK, HIDDEN) * 0.3, torch.randn(2 * WIDTH, RANK * EXPERTS) * 0.3),
        DOWN: (torch.randn(EXPERTS * RANK, WIDTH) * 0.3, torch.randn(HIDDEN, RANK * EXPERTS) * 0.3),
    }


def put(experts: Experts, slot: int, adapter: Factors) -> None:
    for name, (a, b) in adapter.items():
        (experts.base_layer if name == GATE_UP else experts).set_lora(slot, a, b)


def merged(weights: dict[str, Tensor], adapter: Factors) -> dict[str, Tensor]:
    def delta(name: str) -> Tensor:
        a, b = adapter[name]
        return torch.einsum("ore,eri->eoi", b.reshape(-1, RANK, EXPERTS), a.reshape(EXPERTS, RANK, -1))

    found = dict(weights)
    if GATE_UP in adapter:
        gate, up = delta(GATE_UP).chunk(2, dim=1)
        found |= {"gate_proj": weights["gate_proj"] + gate, "up_proj": weights["up_proj"] + up}
    if DOWN in adapter:
        found["down_proj"] = weights["down_proj"] + delta(DOWN)
    return found


def reference(weights: dict[str, Tensor], hidden: Tensor, chosen: Tensor, mix: Tensor) -> Tensor:
    """One token."""
    total = torch.zeros(HIDDEN)
    for expert, weight in zip(chosen.tolist(), mix.tolist()):
        gate, up = weights["gate_proj"][expert] @ hidden, weights["up_proj"][expert] @ hidden
        total += weight * (weights["down_proj"][expert] @ (torch.nn.functional.silu(gate) * up))
    return total


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), chosen, torch.rand(tokens, TOP)


def check(monkeypatch: pytest.MonkeyPatch, slots: list[int], ranks: int = 1) -> None:
    torch.manual_seed(3)
    weights, full, down = random_weights(), random_adapter(), random_adapter()
    del down[GATE_UP]
    adapters: dict[int, Factors] = {0: full, 4: down}
    hidden, chosen, mix = batch(len(slots))
    found = torch.zeros(len(slots), HIDDEN)
    for rank in range(ranks):
        experts = make(monkeypatch, weights, rank, ranks)
        for slot, adapter in adapters.items():
            put(experts, slot, adapter)
        wrapper = SimpleNamespace(token_lora_indices=torch.tensor(slots))
        experts.set_mapping(wrapper)
        found += experts(hidden, chosen, mix)
    for row, slot in enumerate(slots):
        expected = reference(merged(weights, adapters.get(slot, {})), hidden[row], chosen[row], mix[row])
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "slots",
    [[0, 0, 0], [4], [-1, 0, 4, -1, 0, 2], [[-1, 0, 4][i % 3] for i in range(90)]],
    ids=["one adapter", "down alone", "mixed", "many rows"],
)
def test_each_token_gets_its_adapter(monkeypatch: pytest.MonkeyPatch, fused: bool, slots: list[int]) -> None:
    check(monkeypatch, slots)


def test_large_experts_are_stored_by_rows_if_adapters_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_experts, "has_fused_experts", lambda *_: True)
    monkeypatch.setattr(vllm_experts, "BY_ROWS", WIDTH * HIDDEN)
    assert not make(monkeypatch, {}).fused
    monkeypatch.setattr(vllm_experts, "BY_ROWS", WIDTH * HIDDEN + 1)
    assert make(monkeypatch, {}).fused


def test_the_shards_of_two_ranks_add_up(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    check(monkeypatch, [-1, 0, 4, 0], ranks=2)


def test_a_removed_adapter_and_a_warm_up_adapter_leave_the_base(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    torch.manual_seed(4)
    weights = random_weights()
    experts = make(monkeypatch, weights)
    experts.set_mapping(SimpleNamespace(token_lora_indices=torch.tensor([1, 2])))
    put(experts, 1, random_adapter())
    experts.reset_lora(1)
    experts.base_layer.reset_lora(1)
    # vLLM's warm-up adapter: zeros, of a rank that is no multiple of the experts
    experts.set_lora(2, torch.zeros(EXPERTS + 1, WIDTH), torch.zeros(HIDDEN, EXPERTS + 1))
    hidden, chosen, mix = batch(2)
    found = experts(hidden, chosen, mix)
    for row in range(2):
        torch.testing.assert_close(
            found[row], reference(weights, hidden[row], chosen[row], mix[row]), rtol=1e-4, atol=1e-4
        )
