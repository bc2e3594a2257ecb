"""Load and save models and tokenizers; invalid checkpoints are refused before a model is built."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedTokenizerBase,
)

from align.config.lora import Lora, Save
from align.config.parallel import Parallel
from align.config.presets import DEFAULT_FAMILY
from align.errors import UserError
from align.models.family import FamilyConfig, family, family_of, model_types, routed_layers
from align.models.lora.adapters import AnyModel, add_lora, is_trained_in_full, merge_lora, plain_name, save_adapter
from align.models.lora.overlay import Overlay
from align.models.lora.stream import merge_adapter
from align.models.quantized import quantized_weights, require_library
from align.models.shared_weights import SharedWeights
from align.models.weights import check_weights
from align.parallel.offload import require_space
from align.parallel.sharding import full_shape, local_values, world
from align.run.adapted import weights_of, write_pointer
from align.run.checkpoint import read_config
from align.run.folder import MODEL, remove_folder, replace_folder
from align.run.refusals import IS_LANGUAGE_MODEL, IS_REWARD_MODEL, config_problem, is_scorer
from align.train.finite import require_finite
from align.train.vocabulary import read_tokenizer, train_padding_row


def check_checkpoint(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """Return the values of a checkpoint's config.json.

    Raises `UserError` unless the folder has safetensors weights and a valid configuration of a registered family.

    weights: False skips the check for weights.
    """
    path, config = folder / "config.json", read_config(folder)
    if problem := config_problem(config, model_types()):
        raise UserError(f"{folder}: {problem}")
    if weights and not any((base := weights_of(folder).base).glob("*.safetensors")):
        raise UserError(f"{base}: it has no safetensors file; convert the weights (pickled weights are never loaded).")
    settings = checked_config(config, str(path), "restore the value that the model was trained with")
    return {**config, "vocab_size": settings.vocab_size}


def checked_config(values: dict[str, Any], where: str, fix: str) -> Any:
    """Build the configuration from `values`, or raise `UserError` if they are invalid.

    The error names `where`, the invalid value and `fix`. Without a `model_type` the values are for the family that
    recipes build from scratch.
    """
    model_type = values.get("model_type", DEFAULT_FAMILY)
    if model_type not in model_types():
        raise UserError(
            f"{where}: model_type is '{model_type}', which align does not know; docs/families.md lists the model types."
        )
    known = family(model_type)
    for name, field in known.config.__dataclass_fields__.items():
        value, default = values.get(name), field.default
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if value is not None and number and not isinstance(value, int | float | list):
            raise UserError(f"{where}: {name} is {value!r}, but must be a number; {fix}.")
    try:
        config = known.config(**values)
    except Exception as error:  # transformers raises many types for values it cannot use
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise UserError(f"{where}: a value cannot be used ({reason}); {fix}.") from error
    if problem := known.size_problem(config):
        raise UserError(f"{where}: {problem}; {fix}.")
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer and check that it fits the model's vocabulary.

    `prepare_chat_template` prepares its chat template for training.
    """
    return read_tokenizer(folder, check_checkpoint(folder)["vocab_size"])


@contextmanager
def _damage_explained(folder: Path) -> Iterator[None]:
    """Turn errors while weights are read into a `UserError`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: the weights cannot be read ({error}); copy or download them again.") from error


def load_policy(
    folder: Path,
    dtype: str,
    parallel: Parallel | None = None,
    lora: Lora | None = None,
    *,
    frozen: bool = False,
    quantized_for: Lora | None = None,
    shared: SharedWeights | None = None,
) -> AnyModel:
    """Load a causal language model.

    Args:
        folder: The checkpoint.
        dtype: Precision of the loaded weights. New adapters are float32, except under `parallel`.
        parallel: Shard the model over the ranks; None loads the whole model.
        lora: Add new adapters with `add_lora`, after quantising the weights if `lora.quantize` is set.
        frozen: Freeze every parameter.
        quantized_for: Quantise the weights as for these adapters, if `quantize` is set, but add none; not with
            `parallel`.
        shared: Take over frozen weights of other models, and offer this model's to later ones; not with `parallel`.
    """
    settings = _policy_config(folder)
    with _damage_explained(folder):
        if parallel is not None:
            model = _load_sharded(family_of(settings).policy, settings, folder, dtype, parallel, lora, frozen=frozen)
        else:
            in_common = shared if frozen or lora is not None else None
            model = _load_whole(family_of(settings).policy, settings, folder, dtype, in_common, lora or quantized_for)
            model = add_lora(model, lora, task="CAUSAL_LM") if lora is not None else model
    train_padding_row(model)
    if frozen:
        model.requires_grad_(False)
    if shared is not None:
        shared.offer(model)
    return model


def _policy_config(folder: Path) -> FamilyConfig:
    """Configuration of a language model's checkpoint, after checking that the weight files' headers match it."""
    if is_scorer(check_checkpoint(folder)):
        raise UserError(f"{folder}: {IS_REWARD_MODEL}")
    with _damage_explained(folder):
        settings: FamilyConfig = AutoConfig.from_pretrained(folder)
        check_weights(weights_of(folder).base, settings)
    return settings


def _load_whole(
    model_class: Any,
    config: FamilyConfig,
    folder: Path,
    dtype: str,
    shared: SharedWeights | None,
    lora: Lora | None = None,
) -> AnyModel:
    """Load a model in this process. If the checkpoint has adapters, they are added to its base in memory.

    shared: weights that the model may have in common with others.
    lora: settings of adapters, which may ask for weights in 4 bits; they are not added here.
    """
    base, adapters = weights_of(folder)
    overlay = Overlay(adapters, config)
    kept = None
    if lora is not None and lora.quantize is not None:
        require_library()
        kept = partial(is_trained_in_full, lora=lora)
    if shared is not None or kept is not None:
        shared = SharedWeights() if shared is None else shared
        model = shared.load(model_class, config, base, getattr(torch, dtype), overlay, kept)
    else:
        model = model_class.from_pretrained(base, config=config, dtype=getattr(torch, dtype))
        overlay.apply_to(model)
    model.name_or_path = str(folder)
    return model


def _load_sharded(
    model_class: type,
    config: FamilyConfig,
    folder: Path,
    dtype: str,
    parallel: Parallel,
    lora: Lora | None,
    *,
    head_only: bool = False,
    frozen: bool = False,
) -> AnyModel:
    """Load this rank's shard of a model."""
    check_parallel(config, parallel, dtype, lora, trunk_trains=not (head_only or frozen))
    from align.parallel.load import load_sharded

    head_only = head_only or frozen
    return load_sharded(model_class, config, folder, getattr(torch, dtype), parallel, lora, head_only=head_only)


def check_parallel(
    config: FamilyConfig, parallel: Parallel, dtype: str, lora: Lora | None = None, *, trunk_trains: bool = True
) -> None:
    """Raise `UserError` if a model cannot be sharded over these ranks.

    The expert-parallel size must divide each layer's number of experts, and offloaded state must fit in host memory or
    on disk.

    trunk_trains: False if at most the head trains; ignored with `lora`.
    """
    for number, layer in enumerate(routed_layers(config)):
        if problem := parallel.expert_group_problem(layer.experts, f"layer {number}"):
            raise UserError(problem)
    machines = max(1, parallel.processes // int(os.environ.get("LOCAL_WORLD_SIZE", parallel.processes)))
    parameters = sum(math.prod(shape) for shape in family_of(config).published_shapes(config).values())
    trained: int | None = None if trunk_trains else 0
    if lora is not None:
        from align.plan.shape import shape_of

        trained = sum(shape_of("", config.to_dict()).adapters(lora))
    require_space(parallel, parameters, dtype, machines, trained)


def load_reward_model(
    folder: Path, dtype: str, parallel: Parallel | None = None, shared: SharedWeights | None = None
) -> AnyModel:
    """Load a trained reward model in evaluation mode; a language model's checkpoint is refused.

    parallel, shared: as in `load_policy`.
    """
    if not is_scorer(check_checkpoint(folder)):
        raise UserError(f"{folder}: {IS_LANGUAGE_MODEL}")
    return load_scorer(folder, dtype, parallel=parallel, frozen=True, shared=shared).eval()


def load_scorer(
    folder: Path,
    dtype: str,
    *,
    fresh_head: bool = False,
    head_only: bool = False,
    frozen: bool = False,
    parallel: Parallel | None = None,
    lora: Lora | None = None,
    shared: SharedWeights | None = None,
) -> AnyModel:
    """Load a model with one scalar head: a reward model or a critic.

    A language model's checkpoint has no such head. The new head is random rather than zero, so that the trunk has a
    gradient from the first step.

    Args:
        folder: The checkpoint of a language model or of a scorer.
        dtype, parallel, lora, frozen, shared: As in `load_policy`.
        fresh_head: Set the head to zero: a critic's first values are then 0, not the scores of a reward model.
        head_only: Freeze everything but the head. Without `parallel` the head is in float32.
    """
    check_checkpoint(folder)
    settings = AutoConfig.from_pretrained(folder, num_labels=1)
    with _damage_explained(folder):
        check_weights(weights_of(folder).base, settings, scorer=True)
        scorer = family_of(settings).scorer
        if parallel is not None:
            model = _load_sharded(scorer, settings, folder, dtype, parallel, lora, head_only=head_only, frozen=frozen)
        else:
            in_common = shared if frozen or head_only or lora is not None else None
            model = _load_whole(scorer, settings, folder, dtype, in_common, lora)
            if head_only:
                model.score.float()
            if lora is not None:
                model = add_lora(model, lora, task="SEQ_CLS")
    train_padding_row(model)
    if fresh_head:
        for name, parameter in model.named_parameters():
            if plain_name(name) == "score.weight":  # PEFT keeps a frozen and a trained copy of the head
                nn.init.zeros_(local_values(parameter))
    if frozen:
        model.requires_grad_(False)
    elif head_only:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("score" in name and "original_module" not in name)
    if shared is not None:
        shared.offer(model)
    return model


def save_model(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    stage_dir: Path,
    dtype: str,
    parallel: Parallel | None = None,
    *,
    save: Save = "merged",
) -> None:
    """Write stage_dir/model in `dtype`, without adapters.

    A model with adapters is merged, and its adapter is written to stage_dir/adapter. An adapter trained on weights in 4
    bits is merged into the base's unquantised weights, in their own dtype. With `save` "adapter", stage_dir/model has
    the adapter and a pointer to its base instead (`align.run.adapted`), and the model is unchanged.

    Raises `UserError` if a weight is not finite. With `parallel` all ranks must call this; rank 0 writes.
    """
    require_finite(model, stage_dir)
    adapted = hasattr(model, "peft_config")
    if world()[0] == 0 and not (adapted and save == "merged"):
        remove_folder(stage_dir / "adapter")  # of an earlier run with other settings
    if adapted and save == "adapter":
        _save_beside_base(model, tokenizer, stage_dir, getattr(torch, dtype), parallel)
        return
    if parallel is not None:
        _save_sharded(model, tokenizer, stage_dir, getattr(torch, dtype))
        return
    if adapted:
        replace_folder(stage_dir / "adapter", lambda folder: save_adapter(model, folder))
    if quantized_weights(model):
        _save_merged_into_base(model, tokenizer, stage_dir)
        return
    merged = merge_lora(model)
    for parameter in merged.parameters():  # buffers, such as routers' correction biases, keep their precision
        parameter.data = parameter.data.to(getattr(torch, dtype))
    merged.config.dtype = getattr(torch, dtype)

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    replace_folder(stage_dir / MODEL, write)


def _save_beside_base(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    stage_dir: Path,
    dtype: torch.dtype,
    parallel: Parallel | None,
) -> None:
    """Write the adapter, a pointer to its base, and configuration and tokenizer of the whole model."""
    from align.parallel.group import rank_0_last

    plain, base = model.get_base_model(), Path(model.peft_config["default"].base_model_name_or_path)
    config = copy.deepcopy(plain.config)
    config.architectures, config.dtype = [type(plain).__name__], dtype

    def write(folder: Path) -> None:
        if parallel is not None:
            from align.parallel.export import save_sharded_adapter

            save_sharded_adapter(model, folder)
        else:
            save_adapter(model, folder)
        if world()[0] == 0:
            config.save_pretrained(folder)
            if getattr(plain, "generation_config", None) is not None:
                plain.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            write_pointer(folder, stage_dir / MODEL, base, "nf4" if quantized_weights(model) else None)

    with rank_0_last("saving the adapter"):
        if world()[0] == 0:
            replace_folder(stage_dir / MODEL, write)
        else:
            write(stage_dir / MODEL)


def _save_merged_into_base(model: AnyModel, tokenizer: PreTrainedTokenizerBase, stage_dir: Path) -> None:
    """Merge stage_dir/adapter into the files of its base, which are not quantised, in the base's own dtype."""
    base = Path(model.peft_config["default"].base_model_name_or_path)

    def write(folder: Path) -> None:
        merge_adapter(base, model.config, stage_dir / "adapter", folder / MODEL)
        for file in (folder / MODEL).iterdir():
            file.rename(folder / file.name)
        (folder / MODEL).rmdir()
        tokenizer.save_pretrained(folder)

    replace_folder(stage_dir / MODEL, write)


def _save_sharded(model: AnyModel, tokenizer: PreTrainedTokenizerBase, stage_dir: Path, dtype: torch.dtype) -> None:
    from align.parallel.export import save_sharded_adapter, save_sharded_model
    from align.parallel.group import rank_0_last

    def write(folder: Path) -> None:
        save_sharded_model(model, folder, dtype)
        tokenizer.save_pretrained(folder)

    def write_adapter(folder: Path) -> None:
        save_sharded_adapter(model, folder)

    folders = {"adapter": write_adapter} if hasattr(model, "peft_config") else {}
    with rank_0_last("saving the model"):
        for name, work in (folders | {MODEL: write}).items():
            if world()[0] == 0:
                replace_folder(stage_dir / name, work)
            else:
                work(stage_dir / name)


def count_stored_parameters(folder: Path) -> dict[str, int]:
    """`count_parameters` of a language model's checkpoint, without reading or allocating its weights."""
    settings = _policy_config(folder)
    with torch.device("meta"):
        model: Any = family_of(settings).policy(settings)  # type: ignore[arg-type]  # a configuration of this family
    model.tie_weights()
    return count_parameters(model)


def count_parameters(model: AnyModel) -> dict[str, int]:
    """Numbers of total, active (used for one token) and trainable parameters. Call this before adapters are merged.

    Adapters and other copies that PEFT adds count as trainable only.
    """
    total = active = trainable = 0
    layers = routed_layers(model.config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            trainable += math.prod(full_shape(parameter)) if parameter.requires_grad else 0
            continue
        numel = math.prod(full_shape(parameter))
        total += numel
        trainable += numel if parameter.requires_grad else 0
        share = 1.0
        if ".experts." in name and len(full_shape(parameter)) == 3:
            layer = layers[int(name.split("layers.")[1].split(".")[0])]
            share = layer.top_k / layer.experts
        active += int(numel * share)
    return {"total": total, "active": active, "trainable": trainable}
