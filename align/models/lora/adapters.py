"""LoRA adapters (PEFT)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from align.config.lora import Lora, LoraGroup
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
    linear += named_layers(lora, model)
    has_experts = any(isinstance(module, Experts) for module in model.modules())
    # PEFT ignores layers_to_transform for parameters and for modules_to_save, so these are named layer by layer.
    saved = _in_layers(targets.router, lora, model) if has_experts and lora.train_router else []
    saved += embedding_names(model) if lora.train_embeddings else []
    saved += [_head_name(model)] if lora.train_head else []
    stacks = _in_layers(targets.experts, lora, model) if has_experts and lora.experts else None
    saved += _other_modules(lora, model, (*linear, *(stacks or ())))
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
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        lora_dropout=lora.dropout,
        bias="none",
        task_type=task,
        target_modules=linear,
        layers_to_transform=lora.layers,
        target_parameters=stacks,
        modules_to_save=(saved + (["score"] if task == "SEQ_CLS" else [])) or None,
    )


def named_layers(lora: Lora, model: AnyModel) -> list[str]:
    """Full names of the linear layers that the module names in `lora.targets` match.

    Raises `UserError` for a name that matches none.
    """
    router = family_of(model.config).lora(model.config).router
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and name != "score"
        and not name.endswith(router)
    ]
    found: dict[str, None] = {}
    for pattern in lora.names:
        matched = [name for name in linear if matches(name, pattern)]
        if not matched:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserError(
                f"lora.targets: '{pattern}' is neither a group nor the name of a linear layer; the layers are named "
                f"{known}."
            )
        chosen = [name for name in matched if _is_in_layers(name, lora)]
        if not chosen:
            raise UserError(f"lora.layers: it excludes all layers that '{pattern}' names; change layers or targets.")
        found |= dict.fromkeys(chosen)
    return list(found)


def matches(name: str, pattern: str) -> bool:
    """True if the end of a module's name, in whole components, matches a pattern with `*`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def is_trained_in_full(name: str, lora: Lora) -> bool:
    """True if a parameter belongs to a module that `lora.modules_to_save` names."""
    path = name.split(".")
    modules = [".".join(path[:length]) for length in range(1, len(path))]
    return any(matches(module, pattern) for module in modules for pattern in lora.modules_to_save)


def _is_in_layers(name: str, lora: Lora) -> bool:
    number = re.search(r"\blayers\.(\d+)\.", name)
    return lora.layers is None or (number is not None and int(number[1]) in lora.layers)


def _head_name(model: AnyModel) -> str:
    """Name of the module that computes logits, without its path; `UserError` if it cannot be trained alone."""
    head = model.get_output_embeddings()
    if head is None:
        raise UserError("lora.targets: lm_head is not part of a reward model or critic; remove it.")
    if is_tied(model):
        raise UserError("lora.targets: the model's lm_head is its embedding matrix; use embeddings instead of lm_head.")
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name.rpartition(".")[2]


def _other_modules(lora: Lora, model: AnyModel, adapted: tuple[str, ...]) -> list[str]:
    """Full names of the modules that `lora.modules_to_save` matches.

    Raises `UserError` for a name that matches none, and for a module that contains adapters, which PEFT would drop.

    adapted: endings of the names of modules and parameters that get adapters.
    """
    names = [name for name, _ in model.named_modules() if name]
    inside = tuple(f".{ending}" for ending in adapted)
    found: dict[str, None] = {}
    for pattern in lora.modules_to_save:
        matched = [name for name in names if matches(name, pattern)]
        if not matched:
            raise UserError(
                f"lora.modules_to_save: '{pattern}' is not the name of a module; set the end of a name such as "
                f"'{next((name for name in names if 'norm' in name), names[-1])}'."
            )
        # Only modules of decoder layers are subject to `layers`.
        chosen = [name for name in matched if _is_in_layers(name, lora) or "layers." not in name]
        for other in (*names, *(name for name, _ in model.named_parameters())):
            if f".{other}".endswith(inside) and any(f"{other}.".startswith(f"{name}.") for name in chosen):
                raise UserError(
                    f"lora.modules_to_save: '{pattern}' contains '{other}', which gets adapters; remove one of the two."
                )
        found |= dict.fromkeys(chosen)
    return list(found)


def _in_layers(suffixes: tuple[str, ...], lora: Lora, model: AnyModel) -> list[str]:
    """The suffixes, or with `lora.layers` those of the layers' names that exist."""
    if lora.layers is None:
        return [*suffixes]
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    wanted = [f"layers.{number}.{suffix}" for number in lora.layers for suffix in suffixes]
    return [name for name in wanted if any(other.endswith(f".{name}") for other in names)]


def add_lora(model: AnyModel, lora: Lora, *, task: str, in_float32: bool = True) -> AnyModel:
    """Wrap the model so that only the adapters train, the parts that `lora` trains in full (router, embeddings, head,
    `modules_to_save`), and the score head for SEQ_CLS.

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
