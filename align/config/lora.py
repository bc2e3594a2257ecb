"""The section `lora` of a stage: target modules, ranks and the format in which the result is saved.

Nothing here imports torch.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.config.section import Section

LoraGroup = Literal["attention", "shared_expert", "routed_experts"]
Save = Literal["adapter", "merged"]
LORA_TARGETS = {
    "attention": ("attention",),
    "shared_expert": ("shared_mlp",),
    "routed_experts": ("experts",),
    "all-linear": ("attention", "shared_mlp", "experts"),
    "router": ("train_router",),
    "embeddings": ("train_embeddings",),
    "lm_head": ("train_head",),
}
"""The keys of `Lora` that each group in `targets` sets."""
REFUSED_INIT = {
    "pissa": "it changes the base weights, so the adapter would not fit the base that it is saved with",
    "olora": "it changes the base weights, so the adapter would not fit the base that it is saved with",
    "corda": "it changes the base weights, so the adapter would not fit the base that it is saved with",
    "loftq": "it changes the base weights, so the adapter would not fit the base that it is saved with",
    "eva": "it needs activations computed from the data first, and silently skips adapters on stacked experts",
    "lora_ga": "it needs gradients computed from the data first, which PEFT does not collect for stacked experts",
}
"""{initialisation of PEFT: reason why it is refused}."""
OTHER_KEYS = {
    "layers_to_transform": "set `layers`, which also applies to experts and to the router; PEFT ignores it there",
    "exclude_modules": "list the wanted modules in `targets`; PEFT ignores the key for experts",
    "target_modules": "set `targets`, which accepts groups and module names",
    "target_parameters": "set `targets: [routed_experts]`",
    "use_rslora": "set `rslora`",
    "use_dora": "set `dora`",
    "init_lora_weights": "set `init`",
    "lora_alpha": "set `alpha`",
    "lora_dropout": "set `dropout`",
    "rank_pattern": "set `groups`",
    "alpha_pattern": "set `groups`",
}
"""{key of PEFT's LoraConfig that the section lacks: its replacement}."""


class GroupLora(Section):
    """Rank and alpha of one group of adapters."""

    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rank of the group's adapters. Default: `rank` of the section `lora`."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Alpha of the group's adapters. Default: `alpha` of the section `lora`."""


class Lora(Section):
    """Low-rank adapters (PEFT) on attention, shared MLP and routed experts."""

    targets: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    """Parts to train, instead of the keys from `attention` to `train_head`: groups that get adapters (`attention`,
    `shared_expert`, `routed_experts`; `all-linear` is all three), parts that are trained in full (`router`,
    `embeddings`: input and output, `lm_head`: output alone), or names of linear layers, which may contain `*` and match
    the ends of the modules' names: `q_proj`, `layers.0.*.down_proj`."""
    modules_to_save: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Other modules to train in full, by the ends of their names: `input_layernorm`."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The output of the adapters is multiplied by `alpha / rank`."""
    groups: dict[LoraGroup, GroupLora] = Field(default_factory=dict)
    """Other ranks and alphas for some groups, for example `{routed_experts: {rank: 4}}`."""
    rslora: bool = False
    """Multiply the output of the adapters by `alpha / sqrt(rank)` instead (rank-stabilised LoRA)."""
    dora: bool = False
    """Train the norm of each weight's rows separately (DoRA, weight-decomposed LoRA). Needs `experts: false`, because
    PEFT has it for matrices only, and no `parallel`."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """Initial factors; the adapter changes nothing at first. default: A uniform (Kaiming), B zero; gaussian: A normal,
    B zero; orthogonal: both random with B A = 0, which needs even ranks and `experts: false`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the input of the adapters. Must be 0 with `experts: true`: PEFT does not support dropout
    in adapters on stacked expert weights."""
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """Indices of the decoder layers to adapt, from 0. Routers are trained in these layers only. Default: all layers."""
    attention: bool = True
    """Put adapters on the q, k, v and o projections."""
    shared_mlp: bool = True
    """Put adapters on the shared expert, or on the MLP of a layer without experts."""
    experts: bool = True
    """Put adapters on the routed experts. vLLM by itself serves such an adapter only merged into its base."""
    train_router: bool = False
    """Train the router's weight in full. false: the router is frozen. vLLM serves an adapter with a trained router
    only merged into its base."""
    train_embeddings: bool = False
    """Train the input and output embeddings in full. The tokens of `model.add_tokens` need it."""
    train_head: bool = False
    """Train the output embeddings alone in full. Only for a model whose input and output embeddings are not tied."""
    quantize: Literal["nf4"] | None = None
    """Hold the frozen weights of attention, MLPs and routed experts in 4 bits (QLoRA), 0.5625 bytes per value. Products
    are computed in the recipe's `dtype`. Embeddings, head, routers and norms keep that dtype. On a GPU it needs
    bitsandbytes (`align-moe[qlora]`). Not with `dora` or `parallel`. Default: no quantisation."""

    save: Save = "adapter"
    """Content of `model/`. adapter: the adapter and a pointer to its base, which must be kept; later stages
    and commands add the adapter to the base when they load it. merged: whole weights, and the adapter in `adapter/`."""

    @model_validator(mode="before")
    @classmethod
    def _targets(cls, values: Any) -> Any:
        """Set the keys that `targets` stands for: those of the named groups to true, all others to false."""
        if not isinstance(values, dict):
            return values
        for key, fix in OTHER_KEYS.items():
            if key in values:
                raise ValueError(f"'{key}' is a key of PEFT's LoraConfig, not of a recipe; {fix}")
        if (reason := REFUSED_INIT.get(str(values.get("init")))) is not None:
            raise ValueError(f"init '{values['init']}' is not available: {reason}; use default, gaussian or orthogonal")
        targets = values.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            return values
        for target in targets:
            if target not in LORA_TARGETS and (near := get_close_matches(target, LORA_TARGETS, 1, 0.8)):
                raise ValueError(f"targets: '{target}' is not a group; write '{near[0]}'")
        chosen = {key for target in targets for key in LORA_TARGETS.get(target, ())}
        keys = {key: key in chosen for names in LORA_TARGETS.values() for key in names}
        for key, value in keys.items():
            if values.get(key, value) != value:
                raise ValueError(f"targets and {key} contradict each other; remove {key}, which targets replaces")
        return values | keys

    @model_validator(mode="after")
    def _something_to_train(self) -> Lora:
        if not (self.attention or self.shared_mlp or self.experts or self.names):
            raise ValueError(
                "attention, shared_mlp and experts are all false, so there is nothing to put adapters on; set one of "
                "them to true"
            )
        if self.dropout and self.experts:
            raise ValueError(
                "PEFT does not support dropout in adapters on routed experts; set dropout to 0, or experts to false"
            )
        if self.dora and self.experts:
            raise ValueError("DoRA needs matrices, but routed experts are stacks of them; set dora or experts to false")
        if self.dora and self.quantize:
            raise ValueError("DoRA needs the norms of the weights, which quantize rounds; remove one of the two")
        if self.train_head and self.train_embeddings:
            raise ValueError("embeddings include lm_head; remove one of the two")
        for group in self.groups:
            if not getattr(self, LORA_TARGETS[group][0]):
                raise ValueError(f"groups has '{group}', which has no adapters; remove it, or add the group to targets")
        return self

    @model_validator(mode="after")
    def _orthogonal(self) -> Lora:
        if self.init != "orthogonal":
            return self
        if self.experts:
            raise ValueError("init: orthogonal needs matrices, but routed experts are stacks; set experts to false")
        if odd := [rank for rank in (self.rank, *(group.rank or 2 for group in self.groups.values())) if rank % 2]:
            raise ValueError(f"init: orthogonal needs even ranks, but a rank is {odd[0]}; change it, or use gaussian")
        return self

    @property
    def names(self) -> list[str]:
        """The module names in `targets`: all that are not groups."""
        return [target for target in self.targets or () if target not in LORA_TARGETS]

    def rank_of(self, group: LoraGroup) -> int:
        """Rank of a group's adapters."""
        return self.groups.get(group, GroupLora()).rank or self.rank

    def alpha_of(self, group: LoraGroup) -> float:
        """Alpha of a group's adapters."""
        return self.groups.get(group, GroupLora()).alpha or self.alpha

    def adapts(self, layer: int) -> bool:
        """True if the decoder layer with this number gets adapters."""
        return self.layers is None or layer in self.layers
