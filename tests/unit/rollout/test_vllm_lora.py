"""vLLM's products of LoRA factors on a CPU: tokens without an adapter keep the base model's values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from align.rollout.vllm_lora import correct_products

SLOTS, RANK, INPUTS, SLICES = 3, 4, 6, (5, 2)


@pytest.mark.parametrize("tokens", [6, 200], ids=["decoding", "a prompt"])
def test_base_tokens_of_a_mixed_batch_keep_their_values(tokens: int) -> None:
    correct_products()
    correct_products()  # a no-op
    torch.manual_seed(0)
    wrapper = PunicaWrapperCPU(256, max_batches=8, device="cpu")
    # Adapter 7 is in slot 1 and adapter 9 in slot 2, the last one; 0 is no adapter.
    adapters = [(0, 7, 0, 9)[i * 4 // tokens] for i in range(tokens)]
    mapping = LoRAMapping(tuple(adapters), (0, 7, 0, 9), is_prefill=True)
    wrapper.update_metadata(mapping, [None, 7, 9], SLOTS + 1, 32)
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS) for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, size, RANK) for size in SLICES)
    x, y = torch.randn(tokens, INPUTS), torch.randn(tokens, sum(SLICES))
    before = y.clone()
    wrapper.add_lora_linear(y, x, a, b, 1.0, SLICES)
    compare(y, before, x, adapters, a, b)
    # Each step activates its adapters, and copies factors only if a slot is filled anew.
    factors = wrapper.align_factors
    manager = LoRAModelManager.__new__(LoRAModelManager)
    manager.__dict__ = {
        "punica_wrapper_mapping": {"language": wrapper},
        "_active_adapters": {7: None, 9: None},
        "_registered_adapters": {9: SimpleNamespace(id=9)},
        "lora_index_to_id": [None, 7, 9],
        "modules": {"layer": SimpleNamespace(set_lora=lambda slot, a, b: None)},
        "_get_lora_layer_weights": lambda *_: SimpleNamespace(lora_a=None, lora_b=None),
    }
    assert not manager.activate_adapter(9)
    assert wrapper.align_factors is factors
    assert factors
    # Adapter 9 is replaced in its slot, as with load_inplace.
    del manager._active_adapters[9]
    manager.lora_index_to_id = [0, 7, None]
    b[0][2] += 1
    assert manager.activate_adapter(9)
    y = before.clone()
    wrapper.add_lora_linear(y, x, a, b, 1.0, SLICES)
    compare(y, before, x, adapters, a, b)


def compare(
    y: Tensor, before: Tensor, x: Tensor, adapters: list[int], a: tuple[Tensor, ...], b: tuple[Tensor, ...]
) -> None:
    for row, adapter in enumerate(adapters):
        slot = {7: 1, 9: 2}.get(adapter)
        parts = [b[i][slot, 0] @ a[i][slot, 0] @ x[row] for i in range(len(SLICES))] if slot else None
        expected = before[row] if parts is None else before[row] + torch.cat(parts)
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[0], before[0])


def test_a_batch_without_adapters_is_unchanged() -> None:
    correct_products()
    wrapper = PunicaWrapperCPU(16, max_batches=4, device="cpu")
    wrapper.update_metadata(LoRAMapping((0, 0), (0,), is_prefill=True), [7], 2, 32)
    y = torch.ones(2, 3)
    wrapper.add_lora_linear(y, torch.ones(2, 4), (torch.ones(1, 1, 2, 4),), (torch.ones(1, 1, 3, 2),), 1.0, (3,))
    assert torch.equal(y, torch.ones(2, 3))
