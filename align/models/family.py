"""Model families: the contract between one architecture and the rest of the library.

A family is a folder beside this file that defines one `Family`, and a `register` line in `align/models/__init__.py`.
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

    def experts_in(self, layer: int) -> int:
        """Routed experts of a layer; 1 means a dense layer."""

    def top_k_in(self, layer: int) -> int:
        """Experts per token in a layer."""


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

    def lm_head(self, hidden_ND: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens [N] and, without gradient, the entropy [N], both at `temperature`."""


class ScoringModel(Protocol):
    """A reward model or critic."""

    config: FamilyConfig
    model: Trunk
    score: Callable[[Tensor], Tensor]
    """Linear head: hidden states [..., D] -> scores [..., 1]; its parameter is `score.weight`."""


class Place(NamedTuple):
    """The part of a parameter that holds a published tensor.

    parameter: its name in our model.
    expert: index into a stack of experts' matrices, else None.
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


@dataclass(frozen=True)
class Family:
    """One architecture.

    config: class of the configuration, a `FamilyConfig`; `config.model_type` identifies the family.
    trunk: class of the trunk inside `policy` and `scorer`, a `Trunk`.
    policy, scorer: classes of the models, a `Policy` and a `ScoringModel`. Routed experts are
        `align.models.experts.Experts`.
    place: published name -> part of our parameter that holds the tensor.
    published: (our name, tensor) -> (published name, view) of each published tensor in it; the inverse of `place`.
    conversion: function that returns the same map as converters for transformers' `save_pretrained`.
    published_shapes: configuration -> shape of every tensor of the published language model.
    size_problem: configuration -> reason why a model of these sizes cannot be built, if any.
    lora: targets of adapters.
    prepare_vllm: register the family's model class with vLLM in this process.
    """

    config: type[PreTrainedConfig]
    trunk: type[PreTrainedModel]
    policy: type[PreTrainedModel]
    scorer: type[PreTrainedModel]
    place: Callable[[str], Place]
    published: Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]
    conversion: Callable[[], list[WeightConverter | WeightRenaming]]
    published_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    size_problem: Callable[[Any], str | None]
    lora: LoraTargets
    prepare_vllm: Callable[[], None]

    @property
    def model_type(self) -> str:
        """The value of `model_type` in the family's config.json."""
        return self.config.model_type


FAMILIES: dict[str, Family] = {}
"""The registered families by `model_type`."""


def register(family: Family) -> None:
    """Register a family for the stages, for transformers' Auto classes and for transformers' checkpoint saver."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    AutoConfig.register(family.model_type, family.config, exist_ok=True)
    AutoModel.register(family.config, family.trunk, exist_ok=True)
    AutoModelForCausalLM.register(family.config, family.policy, exist_ok=True)
    AutoModelForSequenceClassification.register(family.config, family.scorer, exist_ok=True)
    register_checkpoint_conversion_mapping(family.model_type, family.conversion(), overwrite=True)
    FAMILIES[family.model_type] = family


def family_of(config: Any) -> Family:
    """The family of a configuration, found by its `model_type`; raises `KeyError` if the family is not registered."""
    return FAMILIES[config.model_type]


def load_config(checkpoint: Path) -> Any:
    """Configuration of a checkpoint folder, a `FamilyConfig`."""
    values = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return FAMILIES[values["model_type"]].config(**values)
