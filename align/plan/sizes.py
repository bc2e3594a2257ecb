"""Sizes and parameter counts of a decoder, and the arithmetic on them.

Only the parameters that LoRA settings train by name, and those of DoRA, are counted with torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from align.config.lora import Lora

if TYPE_CHECKING:
    from align.plan.activations import Pass


class Linears(NamedTuple):
    """Inputs plus outputs, summed over the linear layers of a part. Adapters of rank r have r times this size."""

    attention: int
    mlp: int
    experts: int


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    attention, norms, router, experts, mlp: parameter counts. `norms` counts vectors; `experts` counts all routed
        experts; `mlp` counts shared experts, or a dense layer's MLP.
    mlp_width: width of that MLP.
    expert_width: width of one routed expert.
    num_experts, top_k: routed experts, and experts per token; 1 and 1 in a dense layer.
    cache: values of key/value cache per token; 0 if the layer uses the cache of an earlier layer, or has no cache.
    score_width: head sizes of keys and of values, summed over query heads.
    window: maximum number of earlier tokens to which a token attends; None without a limit.
    linears: sizes of the linear layers that adapters are put on.
    """

    attention: int
    norms: int
    router: int
    experts: int
    mlp: int
    mlp_width: int
    expert_width: int
    num_experts: int
    top_k: int
    cache: int
    score_width: int
    window: int | None
    linears: Linears

    @property
    def parameters(self) -> int:
        return self.attention + self.norms + self.router + self.experts + self.mlp

    @property
    def active(self) -> int:
        """Parameters used for one token."""
        routed = self.experts * self.top_k // self.num_experts if self.experts else 0
        return self.parameters - self.experts + routed

    def attended(self, length: int) -> float:
        """Earlier tokens to which a token attends, averaged over a sequence of `length` tokens."""
        if self.window is None or self.window >= length:
            return length / 2
        return self.window * (1 - self.window / (2 * length))


class Saved(NamedTuple):
    """Bytes per token that a layer saves for the backward pass: outside its MLP and experts, and inside them."""

    rest: float
    feed_forward: float


class Activations(Protocol):
    """Activations that a family's forward pass saves for the backward pass."""

    def layer(self, layer: LayerShape, run: Pass) -> Saved:
        """Bytes per token of one layer."""

    def outside(self, run: Pass) -> float:
        """Bytes per token outside the layers: final norm, rotary tables."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; all counts are exact.

    embedding, head: parameters of the embedding and of the vocabulary head; `head` is 0 if it is the embedding.
    outside: other parameters outside the layers, such as the final norm.
    heads: query heads.
    max_length: longest sequence.
    keeps_kv: under activation checkpointing, keys and values are kept, because later layers use them.
    activations: bytes that a forward pass saves.
    config: the values of its config.json, as JSON.
    """

    name: str
    vocab_size: int
    hidden_size: int
    embedding: int
    head: int
    outside: int
    heads: int
    max_length: int
    keeps_kv: bool
    layers: tuple[LayerShape, ...]
    activations: Activations
    config: str = field(repr=False)

    @cached_property
    def kinds(self) -> tuple[tuple[LayerShape, int], ...]:
        """Distinct layers with their counts, so that arithmetic over layers does not grow with depth."""
        return tuple(Counter(self.layers).items())

    @property
    def logits(self) -> int:
        """Parameters of the matrix that computes the logits, which may be the embedding."""
        return self.head or self.embedding

    @cached_property
    def experts(self) -> int:
        """Parameters of all routed experts."""
        return sum(count * layer.experts for layer, count in self.kinds)

    @cached_property
    def trunk(self) -> int:
        """Parameters without head: embedding, layers, final norm."""
        return self.embedding + self.outside + sum(count * layer.parameters for layer, count in self.kinds)

    def parameters(self, *, scorer: bool = False) -> int:
        """All parameters, with the vocabulary head (shared with the embedding if tied) or a scorer's scalar head."""
        return self.trunk + (self.hidden_size if scorer else self.head)

    @cached_property
    def active(self) -> int:
        """Parameters used for one token. Embedding and head count in full, as in `align show-model`."""
        inactive = sum(count * (layer.parameters - layer.active) for layer, count in self.kinds)
        return self.parameters() - inactive

    @cached_property
    def largest_layer(self) -> LayerShape:
        return max(self.layers, key=lambda layer: layer.parameters)

    def cache_bytes(self, length: int, bytes_per_value: int = 2) -> int:
        """Bytes of key/value cache of a sequence of `length` tokens. A window bounds the tokens that a layer keeps."""
        tokens = ((count * layer.cache, min(length, layer.window or length)) for layer, count in self.kinds)
        return bytes_per_value * sum(values * kept for values, kept in tokens)

    def token_flops(self, context: int) -> float:
        """Multiplications and additions of the forward pass for a token with `context` earlier tokens.

        Two per matrix parameter that the token uses, plus attention.
        """
        seen = ((count * layer.score_width, min(context, layer.window or context)) for layer, count in self.kinds)
        return self._matrix_flops() + sum(2 * width * tokens for width, tokens in seen)

    def forward_flops(self, length: int, *, scorer: bool = False) -> float:
        """As `token_flops`, averaged over the tokens of a sequence of `length` tokens."""
        attention = sum(count * 2 * layer.score_width * layer.attended(length) for layer, count in self.kinds)
        return self._matrix_flops(scorer=scorer) + attention

    def _matrix_flops(self, *, scorer: bool = False) -> int:
        matrices = sum(count * (layer.active - layer.norms) for layer, count in self.kinds)
        return 2 * (matrices + (self.hidden_size if scorer else self.logits))

    def embeddings(self, *, scorer: bool) -> int:
        """Parameters of the input embeddings and, unless the model is a scorer, of the head."""
        return self.embedding + (0 if scorer else self.head)

    def adapters(self, lora: Lora, *, scorer: bool = False) -> tuple[int, int]:
        """(trained parameters in routed experts, all other trained parameters, including those of the router).

        See `trained_groups`.
        """
        groups = self.trained_groups(lora, scorer=scorer)
        inside = groups.get("routed_experts", 0)
        return inside, sum(groups.values()) - inside

    def trained_groups(self, lora: Lora, *, scorer: bool = False) -> dict[str, int]:
        """Trained parameters of each group that has any, without the score head of a scorer.

        Module names in `targets` and `modules_to_save`, and DoRA, are counted with torch.
        """
        if is_counted_with_torch(lora):
            from align.plan.adapters import counted_groups

            return counted_groups(self.config, lora, scorer=scorer)
        layers = [layer for number, layer in enumerate(self.layers) if lora.adapts(number)]
        attention, mlp, experts = (lora.rank_of(group) for group in ("attention", "shared_expert", "routed_experts"))
        groups = {
            "attention": attention * sum(layer.linears.attention for layer in layers) * lora.attention,
            "shared_expert": mlp * sum(layer.linears.mlp for layer in layers) * lora.shared_mlp,
            "routed_experts": experts * sum(layer.linears.experts for layer in layers) * lora.experts,
            "router": sum(layer.router for layer in layers) * lora.train_router,
            "embeddings": self.embeddings(scorer=scorer) * lora.train_embeddings,
            "lm_head": self.head * lora.train_head,
        }
        return {group: count for group, count in groups.items() if count}

    def changed(self, merged: Sequence[Lora]) -> int:
        """Parameters that differ between two checkpoints if these adapters were trained between them.

        If the settings name modules, all parameters of the adapted layers count.
        """
        total = 0
        for number, layer in enumerate(self.layers):
            here = [lora for lora in merged if lora.adapts(number)]
            if any(lora.names or lora.modules_to_save for lora in here):
                total += layer.parameters
                continue
            total += layer.attention * any(lora.attention for lora in here)
            total += layer.mlp * any(lora.shared_mlp for lora in here)
            total += layer.experts * any(lora.experts for lora in here)
            total += layer.router * any(lora.train_router for lora in here)
        total += self.embedding * any(lora.train_embeddings for lora in merged)
        return total + self.head * any(lora.train_embeddings or lora.train_head for lora in merged)


def is_counted_with_torch(lora: Lora) -> bool:
    """True if the trained parameters can only be counted on the model itself: modules by name, or DoRA's norms."""
    return bool(lora.names or lora.modules_to_save or lora.dora)


def by_groups(lora: Lora) -> Lora:
    """LoRA settings without module names whose activations are nearly the same.

    Activations are traced on some of the model's layers, which may lack the named modules. Here named modules count as
    all linear layers of attention and MLP. The error is small, because adapters save little for the backward pass.
    """
    named = bool(lora.names)
    changes = {"attention": lora.attention or named, "shared_mlp": lora.shared_mlp or named}
    return lora.model_copy(update={**changes, "targets": None, "modules_to_save": [], "layers": None})
