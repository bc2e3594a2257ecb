"""vLLM's products of LoRA factors on a CPU, corrected: tokens without an adapter keep the base model's values.

vLLM 0.32 takes the last slot's factors for them, because their slot is -1, whenever another token of the batch has an
adapter. `align.rollout.vllm_plugin` replaces the products in each process of vLLM.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from align.models.lora.served import SlotRows, add_product


def correct_products() -> None:
    """Replace the products of linear layers in vLLM's CPU class. A second call is a no-op."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if getattr(PunicaWrapperCPU.add_lora_linear, "is_corrected", False):
        return
    update = PunicaWrapperCPU.update_metadata

    def update_metadata(self: Any, *arguments: Any, **named: Any) -> None:
        update(self, *arguments, **named)
        self.align_division = SlotRows.of(self.token_lora_indices)
        self.align_tokens = len(self.token_lora_indices)

    setattr(PunicaWrapperCPU, "update_metadata", update_metadata)  # noqa: B010 (mypy refuses the assignment)
    setattr(PunicaWrapperCPU, "add_lora_linear", add_lora_linear)  # noqa: B010


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
    lora_a_stacked, lora_b_stacked: per slice A [S, 1, r, I] and B [S, 1, O, r].
    """
    division: SlotRows | None = self.align_division
    if division is None:
        return
    x, y = x.reshape(-1, x.shape[-1])[: self.align_tokens], y.view(-1, y.shape[-1])[: self.align_tokens]
    start = 0
    for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        rows = x if scale == 1 else x * scale
        add_product(y[:, start : start + size], rows, a[:, 0], b[:, 0], division)
        start += size


add_lora_linear.is_corrected = True  # type: ignore[attr-defined]
