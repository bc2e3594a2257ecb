"""Corrections of vLLM's own model classes. `apply` must run in each process before an engine starts.

Without them the results of vLLM 0.32 differ from transformers' for some families; on a CPU they differ silently. Each
correction has a test that fails without it (tests/unit/rollout/test_vllm_fixes.py). Corrections of weight updates are
in `align.rollout.sync.reload`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

EXPERTS = ".mlp.experts."
SINKS = ".self_attn.sinks"
PAST_LOADERS = {"gpt_oss"}
"""Model types whose vLLM class copies stacks of experts and attention sinks without calling their weight loaders. A
reload loses such copies."""


def apply() -> None:
    """Correct vLLM's classes in this process. Applying the corrections again is a no-op."""
    keep_transformers_classes()
    use_router_bias()
    rotate_tensors_of_three_dimensions()
    keep_xielu_dtype()


def keep_transformers_classes() -> None:
    """Stop vLLM's transformers backend from replacing methods of transformers' own classes.

    It decorates the decoder class for torch.compile, which is not used here. A model that the trainer built before the
    engine started could then no longer run.
    """
    from vllm.model_executor.models.transformers.base import Base

    _replace(Base, "_decorate_for_torch_compile", lambda self: None)


def use_router_bias() -> None:
    """Let vLLM's router on a CPU choose experts by biased scores where experts have no groups.

    Without groups it ignores the correction bias of softmax routers and refuses sigmoid routers. One group of all
    experts is the same as no groups.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    def initialise(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        biased = self.e_score_correction_bias is not None and self.scoring_func == "softmax"
        ungrouped = not self.use_grouped_topk and self.custom_routing_function is None
        if ungrouped and (biased or self.scoring_func == "sigmoid"):
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1

    original = _replace(CPURouter, "__init__", initialise)


def rotate_tensors_of_three_dimensions() -> None:
    """Let vLLM's rotary embedding on a CPU accept queries of shape [tokens, heads, head size].

    Its kernel reads [tokens, heads * head size] only. Latent attention passes only a part of each head, and the kernel
    then silently rotates the wrong values.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    def forward_cpu(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
        if query.dim() == 2 and (key is None or key.dim() == 2):
            return original(self, positions, query, key)
        return self.forward_native(positions, query, key)

    original = _replace(RotaryEmbedding, "forward_cpu", forward_cpu)


def keep_xielu_dtype() -> None:
    """Create the parameters of the xIELU activation in the model's dtype; vLLM rounds them to bf16."""
    from vllm.model_executor.layers.activation import XIELU

    def initialise(self: Any, *arguments: Any, **named: Any) -> None:
        if len(arguments) < 5:
            named.setdefault("dtype", torch.get_default_dtype())
        original(self, *arguments, **named)

    original = _replace(XIELU, "__init__", initialise)


def name_partial_loaders(model: nn.Module) -> None:
    """Set `__name__` on weight loaders that are partial functions; vLLM's reload reads it."""
    for tensor in (*model.parameters(), *model.buffers()):
        loader = getattr(tensor, "weight_loader", None)
        if isinstance(loader, functools.partial) and not hasattr(loader, "__name__"):
            loader.__name__ = loader.func.__name__  # type: ignore[attr-defined]


def weights_for_loaders(model_type: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight under names for which vLLM's class calls weight loaders: a stack is split into its experts."""
    if model_type in PAST_LOADERS and EXPERTS in name:
        layer, stack = name.split(EXPERTS)
        for expert, matrix in enumerate(tensor):
            yield f"{layer}{EXPERTS}{expert}.{stack}", matrix
    else:
        yield name, tensor


def is_copied_apart(model_type: str, name: str) -> bool:
    """True for a published weight that no weight loader takes; `copy_apart` copies it after the reload."""
    return model_type in PAST_LOADERS and name.endswith(SINKS)


def copy_apart(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Copy this rank's shard of the attention sinks [heads] into the parameter that the kernel reads."""
    from vllm.distributed import get_tensor_model_parallel_rank

    sinks = model.get_parameter(name.replace(SINKS, ".attn.sinks"))
    heads = len(sinks)
    sinks.data.copy_(tensor[heads * get_tensor_model_parallel_rank() :][:heads])


def _replace(owner: type, name: str, method: Any) -> Any:
    """Replace a method once and return vLLM's own."""
    current = getattr(owner, name)
    original = getattr(current, "align_original", current)
    method.align_original = original
    setattr(owner, name, method)
    return original
