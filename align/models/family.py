"""Model families: the contract between one architecture and the rest of the library.

A family with its own model code is a folder beside this file that defines one `Family`, and a `register` line in
`align/models/__init__.py`. A family that transformers implements is one line in `align/config/families.py`.
Stages look the family up by the checkpoint's `model_type` with `family_of`; they do not depend on an architecture.

Shapes: B rows, T tokens, N completion tokens, D hidden, k experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    from align.models.packing import Packing
    from align.models.routing import RouterReport


class FamilyConfig(Protocol):
    """Fields that stages read from a model's configuration, besides those of every transformers model."""

    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool
    num_labels: int
    router_aux_loss_coef: float
    router_z_loss_coef: float

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""

    @property
    def kv_group_size(self) -> int:
        """Consecutive layers that share one key/value cache; 1 without sharing."""

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json."""


class TrunkOutput(Protocol):
    """Result of a trunk's forward pass.

    last_hidden_state: [B, T, D].
    router: statistics of the routers, if `output_router_logits` was set and there are MoE layers.
    routed_experts: experts chosen by the routers [B, T, layers, k], -1 in layers without experts; set together
        with `router`.
    """

    last_hidden_state: Tensor
    router: RouterReport | None
    routed_experts: Tensor | None


class Trunk(Protocol):
    """Embedding, decoder layers and final norm."""

    def __call__(
        self,
        *,
        input_ids: Tensor,
        packing: Packing,
        use_cache: bool,
        output_router_logits: bool = False,
        routed_experts: Tensor | None = None,
    ) -> TrunkOutput:
        """Forward pass over packed rows.

        Args:
            input_ids: [1, T], the rows of `packing` one after another; each row attends only to itself.
            packing: Start and length of each row.
            use_cache: False; packed rows have no key/value cache.
            output_router_logits: Report the routing.
            routed_experts: [1, T, layers, k], experts to use instead of the routers' choice, except where -1.
        """


class Policy(Protocol):
    """A causal language model."""

    config: FamilyConfig
    model: Trunk

    def lm_head(
        self,
        hidden_ND: Tensor,
        tokens_N: Tensor,
        temperature: float = 1.0,
        count: float | None = None,
        mean_logits: bool = False,
    ) -> Any:
        """`align.losses.linear_head.TokenScores` of the tokens [N] at `temperature`.

        With `count`: (sum of -log-probability divided by `count`, scores without gradient).
        """


class ScoringModel(Protocol):
    """A reward model or critic."""

    config: FamilyConfig
    model: Trunk
    score: Callable[[Tensor], Tensor]
    """Linear head: hidden states [..., D] -> scores [..., 1]; its parameter is `score.weight`."""


class Place(NamedTuple):
    """The part of a parameter that holds a published tensor.

    parameter: its name in our model.
    expert: index into a stack of experts' matrices, otherwise None.
    half: 0 or 1 for the upper or lower half of the expert's matrix; None for the whole matrix.
    """

    parameter: str
    expert: int | None = None
    half: int | None = None

    def within(self, parameter: Tensor) -> Tensor:
        """View of this part of `parameter`."""
        if self.expert is None:
            return parameter
        matrix = parameter[self.expert]
        return matrix if self.half is None else matrix.chunk(2)[self.half]


class RoutedLayer(NamedTuple):
    """Number of routed experts in a decoder layer, and number of experts per token."""

    experts: int
    top_k: int


DENSE = RoutedLayer(1, 1)
"""A layer without routed experts."""


class Names(Protocol):
    """Map between published names and parameters."""

    def place(self, published: str) -> Place:
        """The part of our parameter that holds the tensor."""

    def published(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(published name, view) of each published tensor in our parameter `name`; the inverse of `place`."""


@dataclass(frozen=True)
class LoraTargets:
    """Suffixes of the names of modules and parameters that LoRA may train.

    attention, mlp: linear layers.
    experts: stacked parameters of the routed experts.
    router: router modules, which are trained in full.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    experts: tuple[str, ...]
    router: tuple[str, ...]


def do_nothing() -> None:
    """Default of `Family.prepare_vllm`."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    config: class of the configuration, a `FamilyConfig`; `config.model_type` identifies the family.
    trunk: class of the trunk inside `policy` and `scorer`, a `Trunk`, or a base of that class.
    policy, scorer: classes of the models, a `Policy` and a `ScoringModel`. Routed experts are
        `align.models.experts.Experts`. `from_pretrained` loads a checkpoint, `save_pretrained` writes one.
    names: configuration -> map between published names and parameters.
    published_shapes: configuration -> shape of every tensor of the published language model.
    layers: configuration -> routed experts of each decoder layer.
    size_problem: configuration -> reason why a model of these sizes cannot be built, if any.
    lora: configuration -> targets of adapters.
    prepare_vllm: register the family's model class with vLLM in this process; by default vLLM's own class is used.
    conversion: converters between the published layout and ours for transformers' `save_pretrained`; only for a family
        that transformers does not know.
    serves_expert_adapters: True if vLLM runs the family with LoRA adapters on routed experts that are not merged.
    """

    config: type[PreTrainedConfig]
    trunk: type[PreTrainedModel]
    policy: type[PreTrainedModel]
    scorer: type[PreTrainedModel]
    names: Callable[[Any], Names]
    published_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    layers: Callable[[Any], list[RoutedLayer]]
    size_problem: Callable[[Any], str | None]
    lora: Callable[[Any], LoraTargets]
    prepare_vllm: Callable[[], None] = do_nothing
    conversion: Callable[[], list[WeightConverter | WeightRenaming]] = list
    serves_expert_adapters: bool = False

    @property
    def model_type(self) -> str:
        """The value of `model_type` in the family's config.json."""
        return self.config.model_type


FAMILIES: dict[str, Family] = {}
"""The families built so far, by `model_type`; `_MAKERS` builds the others when they are first needed."""
_MAKERS: dict[str, Callable[[], Family]] = {}


def register(family: Family) -> None:
    """Register a family with its own model code for the stages, transformers' Auto classes and transformers' saver."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    AutoConfig.register(family.model_type, family.config, exist_ok=True)
    AutoModel.register(family.config, family.trunk, exist_ok=True)
    AutoModelForCausalLM.register(family.config, family.policy, exist_ok=True)
    AutoModelForSequenceClassification.register(family.config, family.scorer, exist_ok=True)
    register_checkpoint_conversion_mapping(family.model_type, family.conversion(), overwrite=True)
    FAMILIES[family.model_type] = family


def register_lazily(model_type: str, make: Callable[[], Family]) -> None:
    """Register a family that transformers implements.

    `make` imports transformers' module of the family, so it is called only when the family is first needed.
    transformers' Auto classes keep their own classes.
    """
    _MAKERS[model_type] = make


def model_types() -> list[str]:
    """The `model_type`s of the registered families."""
    return list({**FAMILIES, **_MAKERS})


def family(model_type: str) -> Family:
    """The registered family of a `model_type`; raises `KeyError` if there is none."""
    if model_type not in FAMILIES:
        FAMILIES[model_type] = _MAKERS[model_type]()
    return FAMILIES[model_type]


def family_of(config: Any) -> Family:
    """The family of a configuration, found by its `model_type`; raises `KeyError` if the family is not registered."""
    return family(config.model_type)


def routed_layers(config: Any) -> list[RoutedLayer]:
    """Routed experts of each decoder layer."""
    return family_of(config).layers(config)


def load_config(checkpoint: Path) -> Any:
    """Configuration of a checkpoint folder, a `FamilyConfig`."""
    values = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return family(values["model_type"]).config(**values)
