"""Routed experts in vLLM, with LoRA adapters of several requests in one batch.

Shapes: T tokens, D hidden, E experts, k experts per token, F expert width (rank-local); N rows sorted by expert and
slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.lora.layers.base import BaseLayerWithLoRA

from align.models.experts import mix_experts
from align.models.hunyuan.configuration import HunYuanConfig
from align.models.hunyuan.vllm_kernels import BLOCK, fused_experts, has_fused_experts, in_rows
from align.models.lora.served import StackFactors, factors_by_expert, grouped_rows
from align.models.swiglu import gated_halves

GATE_UP, DOWN = "base_layer", "experts"
"""PEFT's names of the factors of a layer's two stacks: `mlp.experts.base_layer` and `mlp.experts`."""
BY_ROWS = 2**19
"""Minimum number of values of an expert's matrix [D, F] for storage by rows if adapters are served.

vLLM's kernel cannot apply adapters, so experts with adapters are computed one by one. At this size, products by rows
take as long as the kernel. In the kernel's order they take much longer."""


class StackAdapters(BaseLayerWithLoRA):
    """Adapters of one stack of experts, in the slots of vLLM's LoRA manager.

    inputs, outputs: Sizes of an adapter's factors on this rank.
    shard: (A [E, r, I], B [E, O, r]) of an adapter -> this rank's shards.
    """

    def __init__(
        self, experts: int, inputs: int, outputs: int, shard: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ):
        super().__init__()
        lora = get_current_vllm_config().lora_config
        self.num_experts, self.shard = experts, shard
        self.factors: StackFactors | None = None
        if lora is not None:
            assert isinstance(lora.lora_dtype, torch.dtype)
            self.factors = StackFactors(experts, inputs, outputs, lora.lora_dtype)
            self.slots = lora.max_loras
        # vLLM's warm-up reads the sizes and the dtype of an adapter here.
        dtype = torch.float32 if self.factors is None else self.factors.a.dtype
        self.lora_a_stacked = (torch.empty(0, inputs, dtype=dtype, device="meta"),)
        self.lora_b_stacked = (torch.empty(outputs, 0, dtype=dtype, device="meta"),)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Set the adapter of a slot. lora_a: A [E r, I]; lora_b: B [O, r E], multiplied by the scaling."""
        assert self.factors is not None
        self.factors.remove(index)
        if not lora_b.any():
            return  # also vLLM's warm-up adapter, whose rank is not a multiple of the number of experts
        self.factors.put(index, *self.shard(*factors_by_expert(lora_a, lora_b, self.num_experts)))

    def reset_lora(self, index: int) -> None:
        assert self.factors is not None
        self.factors.remove(index)


class Experts(StackAdapters):
    """Routed SwiGLU experts as stacked parameters: `w13` [E, 2F, D] (gate over up) and `w2` [E, D, F].

    If vLLM's CPU kernel computes them, the parameters are stored in the kernel's order (see `matrix`). If adapters are
    served, that holds for small experts only (see `BY_ROWS`). The module holds the adapters on `w2`, and its child
    `base_layer` those on `w13`.
    """

    embedding_modules = {GATE_UP: "", DOWN: ""}
    """vLLM's LoRA manager takes modules with these names that are neither linear layers nor its own experts."""

    def __init__(self, config: HunYuanConfig, layer: int):
        ranks = get_tensor_model_parallel_world_size()
        experts, width = config.experts_in(layer), config.intermediate_size // ranks
        super().__init__(experts, width, config.hidden_size, shard_down)
        self.base_layer = StackAdapters(experts, config.hidden_size, 2 * width, shard_gate_up)
        self.ranks, self.width = ranks, width
        by_rows = self.factors is not None and width * config.hidden_size >= BY_ROWS
        self.fused = has_fused_experts(config, width) and not by_rows
        self.w13 = nn.Parameter(torch.empty(experts, 2 * width, config.hidden_size), requires_grad=False)
        self.w2 = nn.Parameter(torch.empty(experts, config.hidden_size, width), requires_grad=False)
        self.act = ACT2FN[config.hidden_act]

    def matrix(self, expert: int, projection: str) -> Tensor:
        """View of this rank's shard of a published matrix: [rows, columns], or [rows/16, 16, columns] for vLLM's
        kernel."""
        stack = self.w2.data if projection == "down_proj" else self.w13.data
        rows = in_rows(stack[expert]) if self.fused else stack[expert]
        return rows if projection == "down_proj" else rows.chunk(2)[projection == "up_proj"]

    def load(self, expert: int, projection: str, weight: Tensor) -> None:
        """Copy this rank's shard of one expert's published matrix into its stack."""
        rank = get_tensor_model_parallel_rank()
        share = weight.chunk(self.ranks, dim=1 if projection == "down_proj" else 0)[rank]
        self.matrix(expert, projection).copy_(share.unflatten(0, (-1, BLOCK)) if self.fused else share)

    def forward(self, hidden_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Like `mix_experts` with each token's adapter, all-reduced over the tensor-parallel ranks."""
        slots_T = self._slots(len(hidden_TD))
        if slots_T is None:
            output = self._without_adapters(hidden_TD, experts_Tk, weights_Tk)
        elif not (slots_T < 0).any():
            output = self._with_adapters(hidden_TD, experts_Tk, weights_Tk, slots_T)
        else:
            output = torch.empty_like(hidden_TD)
            plain, adapted = (slots_T < 0).nonzero().squeeze(1), (slots_T >= 0).nonzero().squeeze(1)
            output[plain] = self._without_adapters(hidden_TD[plain], experts_Tk[plain], weights_Tk[plain])
            output[adapted] = self._with_adapters(
                hidden_TD[adapted], experts_Tk[adapted], weights_Tk[adapted], slots_T[adapted]
            )
        return tensor_model_parallel_all_reduce(output) if self.ranks > 1 else output

    def _slots(self, tokens: int) -> Tensor | None:
        """Slot of each token [T], -1 for tokens without an adapter on these experts; None if no token has one."""
        if self.factors is None or self.base_layer.factors is None:
            return None
        held = self.factors.place.keys() | self.base_layer.factors.place.keys()
        if not held:
            return None
        slots_T: Tensor = self.punica_wrapper.token_lora_indices
        if len(slots_T) != tokens:  # a dummy batch, or padding after the tokens
            slots_T = nn.functional.pad(slots_T, (0, max(0, tokens - len(slots_T))), value=-1)[:tokens]
        present = set(slots_T.tolist())
        if not present & held:
            return None
        if others := present - held - {-1}:
            slots_T = torch.where(torch.isin(slots_T, torch.tensor(sorted(others), device=slots_T.device)), -1, slots_T)
        return slots_T

    def _without_adapters(self, hidden_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        if self.fused:
            return fused_experts(hidden_TD, experts_Tk, weights_Tk, self.w13, self.w2)
        return mix_experts(hidden_TD, experts_Tk, weights_Tk, self.w13, self.w2, self.act)

    def _with_adapters(self, hidden_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor, slots_T: Tensor) -> Tensor:
        gate_up, down = self.base_layer.factors, self.factors
        assert gate_up is not None
        assert down is not None
        copies = experts_Tk.shape[1]
        order, groups = grouped_rows(experts_Tk.flatten(), slots_T.repeat_interleave(copies), self.slots)
        counts = [0] * self.num_experts
        for group in groups:
            counts[group.expert] += group.size
        tokens = order // copies
        rows_ND = hidden_TD.index_select(0, tokens)
        middle = self._product(rows_ND, self.w13, counts)
        gate_up.add(middle, rows_ND, groups)
        hidden = gated_halves(self.act, middle)
        outputs_ND = self._product(hidden, self.w2, counts)
        down.add(outputs_ND, hidden, groups)
        outputs_ND *= weights_Tk.flatten().index_select(0, order).to(outputs_ND.dtype)[:, None]
        if copies == 1:
            result = torch.empty_like(hidden_TD)
            result[tokens] = outputs_ND
            return result
        return torch.zeros_like(hidden_TD).index_add_(0, tokens, outputs_ND)

    def _product(self, rows_NI: Tensor, stack: Tensor, counts: list[int]) -> Tensor:
        """Product of each row with its expert's matrix, for rows sorted by expert.

        A matrix in the kernel's order is multiplied in blocks of 16 outputs, without a copy.
        """
        outputs, inputs = stack.shape[1:]
        result = rows_NI.new_empty(len(rows_NI), outputs)
        for rows, part, matrix in zip(rows_NI.split(counts), result.split(counts), stack, strict=True):
            if not len(rows):
                continue
            if self.fused:
                product = rows @ matrix.view(outputs // BLOCK, inputs, BLOCK)
                part.unflatten(1, (-1, BLOCK)).copy_(product.transpose(0, 1))
            else:
                torch.mm(rows, matrix.T, out=part)
        return result


def shard_gate_up(a_ErI: Tensor, b_EOr: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's shard of an adapter on gate over up: its rows of both halves of B."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return a_ErI, torch.cat([half.chunk(ranks, dim=1)[rank] for half in b_EOr.chunk(2, dim=1)], dim=1)


def shard_down(a_ErI: Tensor, b_EOr: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's shard of an adapter on the down projection: its columns of A."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return a_ErI.chunk(ranks, dim=2)[rank], b_EOr
