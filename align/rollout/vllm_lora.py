"""Correct vLLM's products of LoRA factors on a CPU, so that tokens without an adapter keep the base model's values.

The slot of such tokens is -1. If another token of the batch has an adapter, vLLM 0.32 uses the last slot's factors for
them. `align.rollout.vllm_plugin` replaces the products in each process of vLLM.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from align.models.lora.served import LinearFactors, SlotRows


def correct_products() -> None:
    """Replace the products of linear layers in vLLM's CPU class. A second call is a no-op."""
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if getattr(PunicaWrapperCPU.add_lora_linear, "is_corrected", False):
        return
    update, activate = PunicaWrapperCPU.update_metadata, LoRAModelManager.activate_adapter

    def update_metadata(
        self: Any, mapping: Any, lora_index_to_id: list[int | None], *arguments: Any, **named: Any
    ) -> None:
        update(self, mapping, lora_index_to_id, *arguments, **named)
        self.align_division = SlotRows.of(self.token_lora_indices)
        self.align_tokens = len(self.token_lora_indices)
        slots = tuple(slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None)
        if slots != getattr(self, "align_slots", None):
            self.align_slots, self.align_factors = slots, {}

    def activate_adapter(self: Any, lora_id: int) -> bool:
        # vLLM calls this for each adapter of a batch before each forward pass. It returns False if the adapter already
        # has a slot.
        filled = activate(self, lora_id)
        if filled:
            for wrapper in self.punica_wrapper_mapping.values():
                wrapper.align_factors = {}
        return filled

    setattr(PunicaWrapperCPU, "update_metadata", update_metadata)  # noqa: B010 (mypy refuses the assignment)
    setattr(PunicaWrapperCPU, "add_lora_linear", add_lora_linear)  # noqa: B010
    setattr(LoRAModelManager, "activate_adapter", activate_adapter)  # noqa: B010


def add_lora_linear(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """Add scale * B A x to `y` in place for each slice of the outputs, with the factors of each token's slot.

    x, y: [T, I] and [T, O]; vLLM may add padding after the T tokens of its mapping.
    lora_a_stacked, lora_b_stacked: per slice A [S, 1, r, I] and B [S, 1, O, r], both padded with zeros to the largest
        rank. Their factors are copied once without padding.
    """
    division: SlotRows | None = self.align_division
    if division is None:
        return
    key = lora_a_stacked[0].data_ptr()
    factors = self.align_factors.get(key)
    if factors is None:
        a, b = ([stacked[:, 0] for stacked in each] for each in (lora_a_stacked, lora_b_stacked))
        factors = self.align_factors[key] = LinearFactors(a, b, self.align_slots)
    x, y = x.reshape(-1, x.shape[-1])[: self.align_tokens], y.view(-1, y.shape[-1])[: self.align_tokens]
    factors.add(y, x if scale == 1 else x * scale, division)


add_lora_linear.is_corrected = True  # type: ignore[attr-defined]
