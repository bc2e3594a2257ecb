"""Classes of the adopted models: transformers' own, with mix-ins that answer align's protocol (`align.models.family`).

A class keeps transformers' name, so that a saved configuration names a class that transformers has.

Shapes: B sequences, T tokens, N tokens of a packed row, D hidden, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutputWithPast

from align.config.families import Facts
from align.losses.linear_head import LogitTransform
from align.models.adopted import attention
from align.models.adopted.attention import CountedPacking
from align.models.adopted.experts import AdoptedExperts, InputWeighingMoe, TransposedExperts
from align.models.adopted.routing import CURRENT, ReportingRouter, RoutingPass, ScoringRouter
from align.models.adopted.vllm_fields import vllm_fields
from align.models.heads import ScoreHead, TokenHead, last_positions
from align.models.mixing import mixed
from align.models.packing import Packing
from align.models.routing import RouterReport, Routing, choices_of_layers, report_routing

PREFIX = "model"
"""Attribute of the trunk inside a policy or scorer."""


_REPORTING: dict[type, type] = {}


def reporting(kind: type[ModelOutput]) -> type[ModelOutput]:
    """The output class of a family's trunk, with the fields `router` and `routed_experts` of `TrunkOutput`."""
    if kind not in _REPORTING:
        fields = {"router": RouterReport | None, "routed_experts": Tensor | None}
        members = {"__annotations__": fields, **dict.fromkeys(fields)}
        _REPORTING[kind] = dataclass(type(kind.__name__, (kind,), members))
    return _REPORTING[kind]


class AdoptedTrunk(PreTrainedModel):
    """Mix-in before the trunk's class.

    routes: True if there are routers whose decisions are known.
    """

    facts: Facts
    routes: bool

    def forward(
        self,
        *args: Any,
        packing: Packing | None = None,
        output_router_logits: bool | None = None,
        routed_experts: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward pass of the trunk; the arguments are those of transformers, and those of `align.models.family.Trunk`.

        With a packing, a cache, a mask or positions are refused by `ValueError`.
        """
        mask = kwargs.get("attention_mask")
        if packing is not None:
            if any(kwargs.get(name) is not None for name in ("past_key_values", "attention_mask", "position_ids")):
                raise ValueError("packed sequences take neither a cache nor an attention mask nor positions")
            kwargs["use_cache"] = False
        padded = packing.padded() if packing is not None and self.facts.mixes_neighbours else None
        replay = None if routed_experts is None else routed_experts.flatten(0, 1)
        if padded is not None:
            kwargs["input_ids"] = kwargs["input_ids"][0][padded.slots_SL]
            mask = kwargs["attention_mask"] = padded.mask_SL
            replay = None if replay is None else replay[padded.slots_SL.flatten()]
        elif packing is not None:
            counted = CountedPacking(packing)
            # Any mask with four dimensions is passed on as it is; transformers would build one of N x N.
            unused = torch.empty(1, 1, 1, 1, device=self.device)
            kwargs |= {"packing": counted, "position_ids": packing.position_ids, "attention_mask": unused}
        routing = RoutingPass(replay)
        reports = bool(output_router_logits or replay is not None) and self.routes
        if reports:
            kwargs["routing"] = routing
        output = super().forward(*args, **kwargs)
        hidden = output.last_hidden_state
        if packing is not None and padded is None and not counted.used:
            raise RuntimeError(f"{type(self).__name__} does not pass a packing on to its attention layers")
        if padded is not None:
            hidden = hidden.flatten(0, 1)[padded.places_N][None]
            if reports:
                routing.routings = {i: _select(r, padded.places_N) for i, r in routing.routings.items()}
        if packing is not None:
            mask = packing.counts_N
        result = reporting(type(output))(**{**output, "last_hidden_state": hidden})
        if reports:
            self._report(result, routing, mask)
        return result

    def _report(self, output: Any, routing: RoutingPass, mask: Tensor | None) -> None:
        """Add the report of `routing` to the output. mask: [B, T + cached], or [N], weights of the tokens."""
        hidden = output.last_hidden_state
        layers = [routing.routings.get(layer) for layer in range(len(self.layers))]  # type: ignore[arg-type]
        known = [found for found in layers if found is not None]
        if not known:
            raise RuntimeError(f"{type(self).__name__} does not pass keyword arguments on to its layers")
        tokens = hidden[..., 0].numel()
        token_mask = hidden.new_ones(tokens) if mask is None or mask.dim() > 2 else mask[..., -hidden.shape[1] :]
        output.router = report_routing(known, token_mask.reshape(-1))
        output.routed_experts = choices_of_layers(layers).unflatten(0, hidden.shape[:2])


def _select(routing: Routing, places_N: Tensor) -> Routing:
    """The routing of the tokens at `places_N`."""
    chosen = routing.chosen_Tk[places_N]
    logits, weights = routing.logits_TE[places_N], routing.weights_Tk[places_N]
    return routing._replace(logits_TE=logits, chosen_Tk=chosen, experts_Tk=chosen, weights_Tk=weights)


class AdoptedLayer(GradientCheckpointingLayer):
    """Mix-in before a decoder layer's class."""

    layer_number: int
    _gradient_checkpointing_func: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint activations in evaluation mode too, because PPO trains in that mode. With a key/value cache
        nothing is checkpointed, because the recomputation would append to the cache a second time."""
        if self.gradient_checkpointing and torch.is_grad_enabled() and kwargs.get("past_key_values") is None:
            return self._gradient_checkpointing_func(partial(nn.Module.__call__, self, **kwargs), *args)
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(self, *args: Any, routing: RoutingPass | None = None, **kwargs: Any) -> Any:
        if routing is None:
            return super().forward(*args, **kwargs)
        token = CURRENT.set((routing, self.layer_number))
        try:
            return super().forward(*args, **kwargs)
        finally:
            CURRENT.reset(token)


def adapt(model: Any, facts: Facts) -> None:
    """Give a new policy's or scorer's modules the mix-ins."""
    config, trunk = model.config, model.model
    config._attn_implementation = attention.NAME
    config.output_router_logits = False  # transformers would add its own balance loss
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if getattr(config, name, None) is None:
            setattr(config, name, 0.0)
    for name, value in vllm_fields(config).items():
        setattr(config, name, value)  # saved with the model, so that vLLM reads a checkpoint as transformers does
    router = _router_class(trunk)
    for module in list(trunk.modules()):
        if facts.weighs_inputs and hasattr(module, "experts") and hasattr(module, "router"):
            module.__class__ = mixed(InputWeighingMoe, type(module))
            module.experts.__class__ = mixed(TransposedExperts, type(module.experts))
        elif hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            module.__class__ = mixed(AdoptedExperts, type(module))
        elif router is not None and isinstance(module, router):
            module.__class__ = mixed(ScoringRouter if facts.weighs_inputs else ReportingRouter, type(module))
            module.scores_by_sigmoid = facts.sigmoid  # type: ignore[assignment]  # of ReportingRouter
    for number, layer in enumerate(trunk.layers):
        layer.__class__ = mixed(AdoptedLayer, type(layer))
        layer.layer_number = number
    trunk.__class__ = mixed(AdoptedTrunk, type(trunk))
    trunk.facts = facts
    trunk.routes = any(isinstance(module, ReportingRouter) for module in trunk.modules())


def _router_class(trunk: Any) -> type[nn.Module] | None:
    """Class of the routers whose logits transformers records, if they also return their decisions; a plain linear layer
    does not."""
    recorder = (getattr(trunk, "_can_record_outputs", None) or {}).get("router_logits")
    target: type[nn.Module] | None = getattr(recorder, "target_class", None)
    return None if target is nn.Linear else target


def logit_transform(config: Any) -> LogitTransform:
    """Scale and soft cap of the model's logits, from the keys that transformers' families use."""
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = 1 / config.logits_scaling
    return LogitTransform(1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None))


def policy_class(causal: type[PreTrainedModel], facts: Facts) -> type[PreTrainedModel]:
    """Subclass of a family's language model that is a `Policy`."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        causal.__init__(self, config, *args, **kwargs)
        if not hasattr(self, PREFIX):
            raise NotImplementedError(f"{causal.__name__} cannot be adopted: its trunk is not its attribute '{PREFIX}'")
        adapt(self, facts)
        self.lm_head.__class__ = TokenHead
        self.lm_head.transform = logit_transform(config)

    return _derived(causal.__name__, (causal,), {"__init__": __init__, "base_model_prefix": PREFIX}, causal)


def scorer_class(
    causal: type[PreTrainedModel], trunk: type[PreTrainedModel], name: str, facts: Facts
) -> type[PreTrainedModel]:
    """Reward model or critic of a family: the trunk with a linear score head.

    The parameters have the names of transformers' own classifiers, which therefore load its checkpoints.

    name: name of the class.
    """
    base = next(c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel") and c is not PreTrainedModel)

    def __init__(self: Any, config: Any) -> None:
        base.__init__(self, config)  # type: ignore[misc]  # a class of transformers
        self.num_labels = config.num_labels
        self.model = trunk(config)
        adapt(self, facts)
        self.score = ScoreHead(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores [B, num_labels] of each sequence's last attended token, as `logits`."""
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=bool(use_cache), **kwargs
        ).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        return SequenceClassifierOutputWithPast(logits=self.score(hidden[rows, last_positions(hidden, attention_mask)]))

    # The base may be shared with a model of text and images, whose configuration it then names.
    members = {"config_class": causal.config_class, "base_model_prefix": PREFIX, "_tied_weights_keys": None}
    return _derived(name, (base,), {**members, "__init__": __init__, "forward": forward}, causal)


def _derived(name: str, bases: tuple[type, ...], members: dict[str, Any], like: type) -> type[PreTrainedModel]:
    members |= {"__module__": like.__module__, "__qualname__": name, "__doc__": like.__doc__}
    return type(name, bases, members)
