"""LoRA adapters (PEFT)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.config.parts import Lora, LoraGroup
from align.errors import UserError
from align.models.experts import Experts
from align.models.family import family_of

AnyModel = Any
"""A transformers model, plain or inside a PEFT wrapper; neither has attributes that a type checker can follow."""


def lora_config(lora: Lora, model: AnyModel, *, task: str) -> Any:
    """PEFT's configuration for a model; task is CAUSAL_LM or SEQ_CLS (which also trains the score head)."""
    from peft import LoraConfig

    layers = model.config.num_hidden_layers
    if unknown := [number for number in lora.layers or () if number >= layers]:
        raise UserError(
            f"lora.layers: {unknown[0]} is not a layer of the model, which has {layers}; the first layer is 0."
        )
    targets = family_of(model.config).lora(model.config)
    linear = [*(targets.attention if lora.attention else ()), *(targets.mlp if lora.shared_mlp else ())]
    has_experts = any(isinstance(module, Experts) for module in model.modules())
    # PEFT ignores layers_to_transform for parameters and for modules_to_save, so these are named layer by layer.
    saved = _in_layers(targets.router, lora, model) if has_experts and lora.train_router else []
    saved += embedding_names(model) if lora.train_embeddings else []
    groups: dict[LoraGroup, tuple[str, ...]] = {
        "attention": targets.attention,
        "shared_expert": targets.mlp,
        "routed_experts": targets.experts,
    }
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes a float
        rank_pattern={name: lora.rank_of(group) for group in lora.groups for name in groups[group]},
        alpha_pattern={name: lora.alpha_of(group) for group in lora.groups for name in groups[group]},
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        bias="none",
        task_type=task,
        target_modules=linear,
        layers_to_transform=lora.layers,
        target_parameters=_in_layers(targets.experts, lora, model) if has_experts and lora.experts else None,
        modules_to_save=(saved + (["score"] if task == "SEQ_CLS" else [])) or None,
    )


def _in_layers(suffixes: tuple[str, ...], lora: Lora, model: AnyModel) -> list[str]:
    """The suffixes, or with `lora.layers` those of the layers' names that exist."""
    if lora.layers is None:
        return [*suffixes]
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    wanted = [f"layers.{number}.{suffix}" for number in lora.layers for suffix in suffixes]
    return [name for name in wanted if any(other.endswith(f".{name}") for other in names)]


def add_lora(model: AnyModel, lora: Lora, *, task: str, in_float32: bool = True) -> AnyModel:
    """Wrap the model so that only the adapters train, plus the router if `lora.train_router` is set, the embeddings if
    `lora.train_embeddings` is set, and the score head for SEQ_CLS.

    in_float32: keep the trainable parameters in float32, whatever the model's dtype.
    """
    from peft import get_peft_model

    from align.models.lora.experts import apply_by_row

    # Some families keep a router's correction bias as a parameter that never trains.
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tied = lora.train_embeddings and is_tied(model)
    with _without_old_names(), warnings.catch_warnings():
        # join_embeddings ties the copies.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        # The patterns name every layer of a group. PEFT warns about layers that `lora.layers` excludes, and about
        # stacked parameters: it compares patterns with the names of modules only, but applies them to parameters too.
        unmatched = "The following (rank|alpha)_pattern keys did not match any targeted module"
        warnings.filterwarnings("ignore", message=unmatched, category=RuntimeWarning)
        wrapped = get_peft_model(model, lora_config(lora, model, task=task), autocast_adapter_dtype=in_float32)
    apply_by_row(wrapped)
    if lora.train_embeddings:
        join_embeddings(wrapped.get_base_model(), tied=tied)
    for name, parameter in wrapped.named_parameters():
        if plain_name(name) in frozen:
            parameter.requires_grad_(False)  # PEFT trains every parameter of modules_to_save
        if in_float32 and parameter.requires_grad:  # PEFT leaves modules_to_save in the model's dtype
            parameter.data = parameter.data.float()
    return wrapped


@contextmanager
def _without_old_names() -> Iterator[None]:
    """Keep PEFT from moving adapters of an MLP to the routed experts.

    For families that once had a module per expert, it takes `gate_proj` for the experts' old name.
    """
    from peft.utils import transformers_weight_conversion as conversion

    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def embedding_names(model: AnyModel) -> list[str]:
    """Names of the modules that embed tokens and, unless the model is a scorer, compute logits, without their path."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name.rpartition(".")[2] for name, module in model.named_modules() if module in modules and name]


def is_tied(model: AnyModel) -> bool:
    """True if the output embeddings are the input embeddings."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def join_embeddings(model: AnyModel, *, tied: bool) -> None:
    """Tie the trained copies of the embeddings if the originals are tied, and convert the embedded tokens to the
    model's dtype.

    PEFT copies the two modules one after another. Its own option for tied weights makes the head an ordinary linear
    layer, which cannot compute log-probabilities.
    """
    embedding = model.get_input_embeddings()
    copy, dtype = embedding.modules_to_save["default"], embedding.original_module.weight.dtype
    copy.register_forward_hook(lambda _module, _args, output: output.to(dtype))
    if tied:
        model.get_output_embeddings().modules_to_save["default"].weight = copy.weight


def is_lora_weight(name: str) -> bool:
    """True if this parameter of a wrapped model is a LoRA factor, A or B."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """Strip PEFT's prefixes and infixes from a parameter name."""
    for part in (".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


@contextmanager
def without_reference_adapter(model: AnyModel) -> Iterator[None]:
    """Keep TRL from copying the adapter as DPO's reference while it builds the trainer.

    A fresh adapter does not change the model's output, so the model with its adapter disabled is the same reference and
    needs no copy. With a second adapter, `Trainer` would not restore the first one on resume. With ZeRO-3, a rank has
    no full parameters to copy.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    find = model.get_parameter
    model.add_adapter = lambda *_, **__: None
    model.get_parameter = lambda name: find(name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter


def save_adapter(model: AnyModel, folder: Path, **options: Any) -> None:
    """Write the adapter to `folder` as PEFT does, with settings that stock PEFT applies to the same layers."""
    from align.models.lora.targets import make_portable

    model.save_pretrained(folder, **options)
    make_portable(folder, model.config.model_type)


def merge_lora(model: AnyModel) -> AnyModel:
    """Merge the adapters into the weights and return the unwrapped model; a model without adapters is returned
    unchanged."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
