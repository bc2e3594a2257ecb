"""The weights of a HunYuan model under the names of the published checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from align.models.hunyuan.checkpoint import place
from align.models.lora.merge import merged_parameters


@torch.no_grad()
def published_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a `HunYuanForCausalLM`, plain or wrapped by PEFT, adapters merged on the fly.

    Stacked experts are split: `mlp.experts.gate_up_proj` [E, 2F, D] into `mlp.experts.N.gate_proj.weight` and
    `mlp.experts.N.up_proj.weight` [F, D]; `mlp.experts.down_proj` [E, D, F] into
    `mlp.experts.N.down_proj.weight`. Tensors may be views of the model's parameters: copy them before the
    next training step. A tied head is not sent.
    """
    for name, tensor in merged_parameters(model):
        if name.endswith(".mlp.gate.weight"):
            yield name.removesuffix("weight") + "wg.weight", tensor
        elif name.endswith(".mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                yield f"{prefix}{expert}.gate_proj.weight", gate
                yield f"{prefix}{expert}.up_proj.weight", up
        elif name.endswith(".mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                yield f"{prefix}{expert}.down_proj.weight", down
        else:
            yield name, tensor


@torch.no_grad()
def load_published(model: Any, named_tensors: Iterator[tuple[str, Tensor]]) -> int:
    """Copy published weights into a plain model of ours, all of its parameters; returns their bytes."""
    parameters = dict(model.named_parameters())
    missing = {id(parameter): parameter.numel() for parameter in parameters.values()}
    tied = getattr(model.config, "tie_word_embeddings", False)
    size = 0
    for name, tensor in named_tensors:
        if name == "lm_head.weight" and tied:
            continue
        part = place(name)
        if part.parameter not in parameters:
            raise ValueError(f"the weight '{name}' is not part of this model")
        parameter = parameters[part.parameter]
        part.within(parameter).copy_(tensor)
        missing[id(parameter)] -= tensor.numel()
        size += tensor.numel() * tensor.element_size()
    incomplete = [name for name, parameter in parameters.items() if missing[id(parameter)]]
    if incomplete:
        raise ValueError(f"weights are missing for {', '.join(incomplete[:5])}")
    return size
