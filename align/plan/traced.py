"""Activations that a model of any family saves, found by running its forward pass on torch's meta device.

Nothing is computed and no memory is taken: tensors of the meta device have only shapes. The code that runs is that of
training, except for two functions that need values: torch's attention kernel and the row counts of the experts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from align.config.lora import Lora
from align.models.adopted.routing import ReportingRouter
from align.models.experts import Experts
from align.models.family import family_of
from align.models.lora.adapters import add_lora
from align.models.packing import Packing
from align.models.routing import Routing, report_routing
from align.plan.activations import Pass
from align.plan.sizes import LayerShape, Saved

PRODUCTS = (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)
"""Functions whose arguments autocast casts."""
REST, FEED_FORWARD, OUTSIDE = "rest", "feed forward", "outside"
Place = tuple[int, str]
"""Layer and the part of it that saves a tensor; the layer is -1 outside the layers."""


@dataclass(frozen=True)
class TracedActivations:
    """Activations of the model with this configuration.

    config: values of its config.json, as JSON.
    hidden_size: as in the configuration.
    layers: its layers; layers with equal sizes save the same.
    """

    config: str
    hidden_size: int
    layers: tuple[LayerShape, ...] = field(compare=False)

    def layer(self, layer: LayerShape, run: Pass) -> Saved:
        index = self.kinds.index(layer) + 1
        inside = self._bytes((index, FEED_FORWARD), run)
        if layer.experts and run.lora is not None and not run.lora.experts and not run.looped:
            # Frozen experts in a grouped matrix multiplication save neither their rows nor the products of the gate.
            inside -= layer.top_k * (self.hidden_size + layer.expert_width) * run.bytes_per_value
        return Saved(self._bytes((index, REST), run), inside)

    def outside(self, run: Pass) -> float:
        return self._bytes((-1, OUTSIDE), run)

    @cached_property
    def kinds(self) -> list[LayerShape]:
        return list(dict.fromkeys(self.layers))

    def _bytes(self, place: Place, run: Pass) -> float:
        """Bytes per token. Rows share some bytes, such as a window's mask; every row adds the same bytes to them."""
        row = (2 if run.pairs else 1) * run.length
        rows = max(1, run.tokens // row)
        one, two = (self._trace(replace(run, tokens=count * row, looped=True))[place] for count in (1, 2))
        return (one + (rows - 1) * (two - one)) / (rows * row)

    def _trace(self, run: Pass) -> Counter[Place]:
        first = [self.layers.index(kind) for kind in self.kinds]
        # Under LoRA the first layer of a pass saves less, because its input needs no gradient. Another layer is
        # therefore put first, and its bytes are not used.
        return trace(self.config, (first[0], *first), run)


@lru_cache(maxsize=256)
def trace(config: str, layers: tuple[int, ...], run: Pass) -> Counter[Place]:
    """Bytes that a forward pass through these layers alone saves, by position in `layers` and part."""
    model = _model(config, layers, run.bytes_per_value, run.bytes_per_weight, run.lora, run.bytes_per_adapter)
    trunk, sequences = model.model, run.tokens // run.length
    ids = torch.empty((sequences, run.length), dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.empty_like(ids)}
    if not run.padded:
        shared = [0, 1] * (sequences // 2) if run.pairs else None
        packing = Packing([run.length] * sequences, torch.device("meta"), shared)
        inputs = {"input_ids": ids.flatten()[None, : packing.total], "packing": packing}
    recorder = Recorder({id_of(tensor) for tensor in [*model.parameters(), *model.buffers()]})
    with recorder.watch(trunk.layers), WithoutValues(run), recorder.saved():
        trunk(**inputs, use_cache=False)
        for index, layer in enumerate(trunk.layers):
            for router in (module for module in layer.modules() if isinstance(module, ReportingRouter)):
                recorder.place = (index, REST)
                _report(router, run.tokens)
    return recorder.bytes


def _report(router: ReportingRouter, tokens: int) -> None:
    """Compute the router losses of one layer."""
    meta = torch.device("meta")
    logits = torch.empty(tokens, router.num_experts, device=meta, requires_grad=True)
    chosen = torch.empty(tokens, router.top_k, dtype=torch.long, device=meta)
    routing = Routing(logits, chosen, chosen, logits[:, : router.top_k], sigmoid=router.scores_by_sigmoid)
    report_routing([routing], torch.empty(tokens, device=meta))


class Recorder:
    """Records the bytes of the tensors that a forward pass saves, by layer and part; each storage counts once."""

    def __init__(self, known: set[int]):
        """known: ids of storages that are not counted."""
        self.bytes: Counter[Place] = Counter()
        self.place: Place = (-1, OUTSIDE)
        self._known = known
        self._shared: set[int] = set()
        self._kept: list[Tensor] = []  # a freed storage's address could be used again

    @contextmanager
    def watch(self, layers: nn.ModuleList) -> Iterator[None]:
        """Track the layer and part that the forward pass is in."""
        handles = []
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(self._enters(index), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._moves_to((-1, OUTSIDE))))
            for name, child in layer.named_children():
                if not mixes(name) and any(parameter.ndim > 1 for parameter in child.parameters()):
                    handles.append(child.register_forward_pre_hook(self._moves_to((index, FEED_FORWARD))))
                    handles.append(child.register_forward_hook(self._moves_to((index, REST))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def saved(self) -> Any:
        """Context in which saved tensors are recorded."""
        return torch.autograd.graph.saved_tensors_hooks(self._record, lambda tensor: tensor)

    def _enters(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
            self.place = (index, REST)
            self._shared |= {id_of(tensor) for tensor in tensors_in(list(keywords.values()))}

        return hook

    def _moves_to(self, place: Place) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.place = place

        return hook

    def _record(self, tensor: Tensor) -> Tensor:
        storage = id_of(tensor)
        if storage not in self._known:
            self._known.add(storage)
            self._kept.append(tensor)
            place = (-1, OUTSIDE) if storage in self._shared else self.place
            self.bytes[place] += tensor.untyped_storage().nbytes()
        return tensor


def mixes(name: str) -> bool:
    """True for the name of a layer's token mixer, or of a module inside it."""
    module = name.split(".")[0]
    return any(part in module for part in ("attn", "attention", "conv", "mixer")) and "norm" not in module


def id_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


class WithoutValues(TorchFunctionMode):
    """Replaces functions that meta tensors cannot run, and functions whose saved tensors depend on the device."""

    def __init__(self, run: Pass) -> None:
        super().__init__()
        self._run = run
        # By id: keys or values repeated for all query heads, and the originals.
        self._repeated: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            given = [self._repeated.get(id(tensor), (tensor, tensor))[1] for tensor in args[:3]]
            query, key, value = in_narrowest(given)
            mask, dropout = kwargs.get("attn_mask"), kwargs.get("dropout_p", 0.0) > 0
            if self._run.on_cpu and (dropout or value.shape[-1] != query.shape[-1]):
                # torch's only kernel for these cases repeats keys and values. Dropout also saves mask and result.
                heads = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
                return _StoredWeights.apply(query.float(), key.float(), value.float(), 3 if dropout else 1)
            if self._run.short and mask is None:
                return _StoredWeights.apply(query, key, value, 1)
            return _Attention.apply(query, key, value, mask)
        if function is Tensor.tolist:  # rows of each expert, on which saved tensors do not depend
            return [0] * args[0].numel()
        if function in (Tensor.item, Tensor.__bool__):  # for example, the check that a mask hides no token
            return False
        if function in PRODUCTS:
            args = tuple(in_narrowest(args))
        result = function(*args, **kwargs)
        if function is Tensor.repeat_interleave:  # torch's kernel accepts grouped heads, except in fp32 on a GPU
            self._repeated[id(result)] = result, args[0]
        return result


def in_narrowest(values: Sequence[Any]) -> list[Any]:
    """The values, with their tensors in the narrowest of the tensors' dtypes, as autocast casts them."""
    narrow = min((value.dtype for value in values if isinstance(value, Tensor)), key=lambda dtype: dtype.itemsize)
    return [value.to(narrow) if isinstance(value, Tensor) else value for value in values]


class _Attention(torch.autograd.Function):
    """Saves what flash attention saves: queries, keys, values, output, log-sum-exp in fp32, and an additive mask."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, size = query.shape
        # The kernel for heads of one size gives the output the memory layout of the queries.
        rows = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        output = torch.empty_like(query) if value.shape[-1] == size else rows
        saved = [query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)]
        ctx.save_for_backward(*saved, *([] if mask is None else [query.new_empty(mask.shape)]))
        return output


class _StoredWeights(torch.autograd.Function):
    """Saves copies of queries, keys and values, and tensors of the size of the weights [B, H, T, T]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, weights: int) -> Tensor:
        batch, heads, tokens, _ = query.shape
        copies = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
        ctx.save_for_backward(*copies, *(query.new_empty(batch, heads, tokens, tokens) for _ in range(weights)))
        return query.new_empty(batch, heads, tokens, value.shape[-1])


@lru_cache(maxsize=4)
def _model(
    config: str, layers: tuple[int, ...], value_bytes: int, weight_bytes: int, lora: Lora | None, adapter_bytes: int
) -> Any:
    """A policy on the meta device with these layers only, and with adapters on its linear layers if `lora` is given."""
    values = json.loads(config)
    described = CONFIG_MAPPING[values["model_type"]](**values)
    with torch.device("meta"):
        model: Any = family_of(described).policy(described)
    _keep_layers(model, layers)
    narrow = torch.float32 if value_bytes == 4 else torch.bfloat16
    model.to(narrow).train()
    if weight_bytes > value_bytes:
        _as_under_autocast(model, narrow)
    if lora is not None:
        model.requires_grad_(False)
        if lora.attention or lora.shared_mlp:
            # Adapters on experts save little: they compute by row, like the linear layers.
            add_lora(model, lora.model_copy(update={"experts": False}), task="CAUSAL_LM", in_float32=adapter_bytes == 4)
    return model


def _as_under_autocast(model: Any, narrow: torch.dtype) -> None:
    """Give the tensors of a model in `narrow` the dtypes that autocast gives those of a model in fp32.

    Autocast casts the matrices and the inputs of products. It has no effect on the meta device.
    """
    for name, parameter in model.named_parameters():
        # The experts' biases [E, .] are added outside the products.
        if parameter.ndim < 2 or name.endswith("_bias") or parameter is model.get_input_embeddings().weight:
            parameter.data = parameter.data.float()

    def rows_in_narrow(_: nn.Module, arguments: tuple) -> tuple:
        return arguments[0].to(narrow), *arguments[1:]

    def tables_in_narrow(_: nn.Module, arguments: tuple, tables: Any) -> Any:
        return tuple(table.to(narrow) for table in tables) if isinstance(tables, tuple) else tables

    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(rows_in_narrow)
        elif type(module).__name__.endswith("RotaryEmbedding"):  # queries and keys reach attention in `narrow`
            module.register_forward_hook(tables_in_narrow)


def _keep_layers(model: Any, layers: tuple[int, ...]) -> None:
    """Remove all other layers of the trunk."""
    trunk = model.model
    trunk.layers = nn.ModuleList(deepcopy(trunk.layers[index]) for index in layers)  # one may come twice
    for position, layer in enumerate(trunk.layers):
        layer.layer_number = position
    trunk.config.num_hidden_layers = len(layers)
    for key in ("layer_types", "mlp_layer_types"):
        if kinds := getattr(trunk.config, key, None):
            setattr(trunk.config, key, [kinds[index] for index in layers])
