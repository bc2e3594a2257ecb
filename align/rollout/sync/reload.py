"""Update the weights of vLLM's own model classes with vLLM's layerwise reload.

The reload collects the weights of a layer until it is complete, repacks them, and copies the result into the tensors
that the layer computes with. A layer that gets too few weights keeps its old ones, and vLLM only warns; here that is an
error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers
from vllm.platforms import current_platform

from align.rollout.vllm_fixes import copy_apart, is_copied_apart, name_partial_loaders, weights_for_loaders

LISTED = 3
"""Maximum number of layers that an error message names."""


class Incomplete(NamedTuple):
    """A layer that got fewer values than its parameters hold.

    name: the layer's name in vLLM's model.
    parameters: names of its parameters.
    loaded, expected: number of values.
    """

    name: str
    parameters: tuple[str, ...]
    loaded: int
    expected: int

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.parameters)}): {self.loaded:,} of {self.expected:,} values"


class LayerwiseReload:
    """Weight updates of one model, with the interface of a model class that updates its weights in place.

    An update is `begin_update`, any number of calls of `load_weights`, `finish_update`. An unfinished update is
    discarded by the next `begin_update`; until an update is finished the model must not be used.
    """

    def __init__(self, model: nn.Module, model_config: ModelConfig):
        self.model: Any = model
        self.model_config = model_config
        self.model_type: str = model_config.hf_config.model_type
        self.digests: dict[str, str] = {}

    def begin_update(self, digest: Callable[[Tensor], str]) -> None:
        """Begin an update. digest: function that fingerprints a tensor, the same as the sender's."""
        self._digest = digest
        self.digests = {}
        self._apart: dict[str, Tensor] = {}
        self._end_unfinished()
        self._owners = parameter_owners(self.model)
        if current_platform.is_cpu():
            # An MoE layer with an existing kernel would keep the experts that this kernel has packed.
            for module in self.model.modules():
                if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
                    module.quant_method.moe_kernel = None
        name_partial_loaders(self.model)
        initialize_layerwise_reload(self.model)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load some of the published weights.

        Each is copied: vLLM keeps it until its layer is complete, and the sender may reuse the memory before.
        """
        pieces: list[tuple[str, Tensor]] = []
        for name, tensor in weights:
            self.digests[name] = self._digest(tensor)
            if is_copied_apart(self.model_type, name):
                self._apart[name] = tensor.clone()
            else:
                pieces += weights_for_loaders(self.model_type, name, tensor.clone())
        self.model.load_weights(iter(pieces))

    @torch.no_grad()
    def finish_update(self) -> dict[str, str]:
        """End the update; returns a digest per received weight. Raises ValueError if a layer kept old weights."""
        incomplete = self._incomplete()
        finalize_layerwise_reload(self.model, self.model_config)
        for name, tensor in self._apart.items():
            copy_apart(self.model, name, tensor)
        self._apart = {}
        unloaded = {layer.name for layer in incomplete}
        stale = [layer for layer in incomplete if not self._repack_shared(layer, unloaded)]
        if stale:
            more = f" and {len(stale) - LISTED} more" if len(stale) > LISTED else ""
            raise ValueError(
                f"{len(stale)} layers of vLLM's {type(self.model).__name__} got too few weights and keep old ones: "
                f"{'; '.join(map(str, stale[:LISTED]))}{more}. Set rollout.engine: huggingface."
            )
        return self.digests

    def _incomplete(self) -> list[Incomplete]:
        found = []
        for name, module in self.model.named_modules():
            info = get_layerwise_info(module)
            # Attention layers hold only scales, which most checkpoints lack.
            if not info.can_load() or is_deferred_attention_layer(module):
                continue
            parameters, _ = get_layer_params_buffers(module)
            if self._apart:
                parameters.pop("sinks", None)
            expected = (info.load_numel_total or 0) - vocabulary_padding(module)
            if parameters and info.load_numel < expected:
                found.append(Incomplete(name, tuple(sorted(parameters)), info.load_numel, expected))
        return found

    def _repack_shared(self, layer: Incomplete, unloaded: set[str]) -> bool:
        """Repack a layer that shares all its parameters with loaded layers, such as a tied head.

        Returns False for any other layer. The shared parameters are updated already, but the layer's packed copy of
        them is not.
        """
        module = self.model.get_submodule(layer.name)
        for name in layer.parameters:
            owners = self._owners[id(module._parameters[name])]
            if layer.loaded or all(owner in unloaded for owner in owners):
                return False
        module.quant_method.process_weights_after_loading(module)
        return True

    def _end_unfinished(self) -> None:
        """Discard an unfinished update, so that none of its weights count in the next one."""
        layers = [get_layerwise_info(module) for module in self.model.modules()]
        if any(info.can_load() for info in layers):
            for info in layers:
                info.load_numel = 0
                info.loaded_weights.clear()
            finalize_layerwise_reload(self.model, self.model_config)


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: names of the modules that have it}."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return owners


def vocabulary_padding(module: nn.Module) -> int:
    """Number of values in the padding rows of a rank's shard of the vocabulary, which no checkpoint has."""
    shard: Any = getattr(module, "shard_indices", None)
    if shard is None:
        return 0
    rows = shard.num_elements_padded - shard.num_org_elements
    return sum(rows * parameter[0].numel() for parameter in module._parameters.values() if parameter is not None)
