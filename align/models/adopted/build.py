"""Make the `Family` of an adopted `model_type`."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from align.config.families import TABLE
from align.models.adopted.model import AdoptedTrunk, policy_class, scorer_class
from align.models.adopted.names import AdoptedNames
from align.models.adopted.routing import ReportingRouter
from align.models.experts import Experts
from align.models.family import DENSE, Family, LoraTargets, RoutedLayer

MLP = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")
"""Names of the modules of a decoder layer other than attention."""

GATES = ("gate", "router")
"""Endings of the names of routers and of the gates of shared experts, which LoRA never adapts."""


def adopt(model_type: str) -> Family:
    """The family of a `model_type` in `TABLE`."""
    config, facts = CONFIG_MAPPING[model_type], TABLE[model_type]
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    trunk: Any = MODEL_MAPPING[config]
    own: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(config, None)
    scorer_name = own.__name__ if own else causal.__name__.replace("ForCausalLM", "ForSequenceClassification")
    policy = policy_class(causal, facts)
    return Family(
        config=config,
        trunk=AdoptedTrunk,
        policy=policy,
        scorer=scorer_class(causal, trunk, scorer_name, facts),
        names=lambda values: _described(policy, values).names,
        published_shapes=lambda values: dict(_described(policy, values).shapes),
        layers=lambda values: _described(policy, values).layers,
        size_problem=partial(_size_problem, policy),
        lora=lambda values: _described(policy, values).lora,
    )


class _Description:
    """Names, shapes, layers and LoRA targets of a configuration's model, read from the model on torch's meta device."""

    def __init__(self, model: Any):
        self.names = AdoptedNames(model)
        self.shapes = {
            published: tuple(part.shape)
            for name, tensor in model.state_dict().items()
            for published, part in self.names.published(name, tensor)
        }
        self.layers = [_routed(layer) for layer in model.model.layers]
        self.lora = _lora_targets(model)


_DESCRIBED: dict[str, _Description] = {}
"""Descriptions by the configuration's values."""


def _described(policy: type[PreTrainedModel], config: Any) -> _Description:
    values = config.to_dict()
    key = json.dumps({**values, "class": policy.__name__}, sort_keys=True, default=str)
    if key not in _DESCRIBED:
        with torch.device("meta"):
            model = policy(type(config).from_dict(values))
        _DESCRIBED[key] = _Description(model)
    return _DESCRIBED[key]


def _routed(layer: nn.Module) -> RoutedLayer:
    routers = [module for module in layer.modules() if isinstance(module, ReportingRouter)]
    return RoutedLayer(routers[0].num_experts, routers[0].top_k) if routers else DENSE


def _lora_targets(model: nn.Module) -> LoraTargets:
    """Linear layers inside attention and inside MLPs, stacks of experts, and routers."""
    attention, mlp, experts, router = (dict[str, None]() for _ in range(4))  # ordered sets
    routers = [name for name, module in model.named_modules() if isinstance(module, ReportingRouter)]
    inside_routers = tuple(f"{name}." for name in routers)
    for name, module in model.named_modules():
        path = name.split(".")
        if name in routers:
            router[".".join(path[-2:])] = None
        elif isinstance(module, Experts):
            stacks = [stack for stack, values in module.named_parameters(recurse=False) if values.dim() == 3]
            experts |= dict.fromkeys(".".join((*path[-2:], stack)) for stack in stacks)
        elif isinstance(module, nn.Linear) and "layers" in path and not name.startswith(inside_routers):
            targets = mlp if any(part in MLP for part in path) else attention
            if not path[-1].endswith(GATES):
                targets[path[-1]] = None
    return LoraTargets(tuple(attention), tuple(mlp), tuple(experts), tuple(router))


def _size_problem(policy: type[PreTrainedModel], config: Any) -> str | None:
    """The reason why transformers cannot build a model of these sizes, if any."""
    try:
        _described(policy, config)
    except Exception as error:  # many types, for sizes that do not fit each other
        return str(error).strip().splitlines()[-1].strip().rstrip(".") or type(error).__name__
    return None
