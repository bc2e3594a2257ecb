"""Make the recipe's model `base`: link a checkpoint, grow a dense model, or initialise random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, assert_never

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.config.parts import EMBEDDED, HotStartModel, Model, PretrainedModel, ScratchModel
from align.config.paths import local_path
from align.config.presets import DEFAULT_FAMILY, GROWN, unknown_keys
from align.data.chat import prepare_chat_template, set_system_prompt
from align.data.template_defaults import set_template_defaults
from align.data.tokenizer import corpus, train_tokenizer
from align.errors import UserError
from align.models.family import family_of
from align.models.hot_start import convert_hot_start, embedded_source
from align.models.vocabulary import added_token_ids
from align.models.weight_files import weight_files
from align.parallel.group import from_rank_0
from align.run.adapted import POINTER, base_of, with_base, write_pointer
from align.run.checkpoint import read_config
from align.run.context import StageContext, StageResult
from align.run.folder import remove_folder, replace_folder, write_json
from align.run.refusals import path_problem
from align.train.checkpoint import check_checkpoint, checked_config, count_stored_parameters
from align.train.vocabulary import add_tokens, set_pad_token

TEMPLATE_KWARGS = "model.chat_template_kwargs"


def run(context: StageContext) -> StageResult:
    """Write <run>/base/model on rank 0. The pipeline treats `base` as a stage."""
    return from_rank_0("make the base model", lambda: _make(context))


def _make(context: StageContext) -> StageResult:
    model, target = context.recipe.model, context.run_dir / "base" / "model"
    if isinstance(model, ScratchModel):
        replace_folder(target, lambda folder: _from_scratch(model, context.recipe.seed, folder))
    elif isinstance(model, HotStartModel):
        dense = EMBEDDED if model.source == EMBEDDED else str(local_path(model.source))
        if dense != EMBEDDED:
            _require_known_keys(model.config, GROWN.get(read_config(Path(dense)).get("model_type", "")))
        remove_folder(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        convert_hot_start(
            dense,
            target,
            experts=model.experts,
            top_k=model.top_k,
            expert_width=model.expert_width,
            seed=context.recipe.seed,
        )
        _change_template(target, model)
        _change_config(target, model.config)
    elif isinstance(model, PretrainedModel):
        source = _find_pretrained(model)
        replace_folder(target, lambda folder: _link_pretrained(source, folder, model))
        _change_template(target, model)
    else:
        assert_never(model)
    parameters = count_stored_parameters(target)
    context.say(f"  {parameters['total']:,} parameters, {parameters['active']:,} active per token")
    return StageResult(parameters=parameters)


def base_tokenizer(model: Model, seed: int) -> PreTrainedTokenizerBase:
    """The tokenizer that the base model will have, made without the model."""
    if isinstance(model, ScratchModel):
        tokenizer = _scratch_tokenizer(model, seed)
    else:
        if isinstance(model, PretrainedModel):
            source = _find_pretrained(model)
        else:
            source = embedded_source() if model.source == EMBEDDED else local_path(model.source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if isinstance(model, PretrainedModel):
            added_token_ids(tokenizer, model.add_tokens)
        _set_template(tokenizer, model)
    set_pad_token(tokenizer)
    prepare_chat_template(tokenizer)
    return tokenizer


def _scratch_tokenizer(settings: ScratchModel, seed: int) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase
    if isinstance(settings.tokenizer, str):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(local_path(settings.tokenizer)))
        except (OSError, ValueError):
            raise UserError(
                f"model.tokenizer: no tokenizer can be loaded from '{settings.tokenizer}'; set it to a folder with "
                "tokenizer.json, or to a section with vocab_size and data to train one."
            ) from None
    else:
        texts = corpus(settings.tokenizer.data, seed=seed)
        tokenizer = train_tokenizer(texts, settings.tokenizer.vocab_size)
    set_template_defaults(tokenizer, settings.chat_template_kwargs, TEMPLATE_KWARGS)
    return tokenizer


def _from_scratch(settings: ScratchModel, seed: int, folder: Path) -> None:
    tokenizer = _scratch_tokenizer(settings, seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ids}
    values = {**settings.sizes(), **tokens, **settings.config}
    config = checked_config(values, "model.config", "change it")
    torch.manual_seed(seed)
    family_of(config).policy(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _change_template(folder: Path, model: PretrainedModel | HotStartModel) -> None:
    """Set the system message and the variables of the checkpoint's chat template, if the recipe has any."""
    if model.system_prompt is None and not model.chat_template_kwargs:
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _set_template(tokenizer, model)
    for file in folder.iterdir():
        if file.is_symlink() and file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            file.unlink()  # a link to the original checkpoint's file
    tokenizer.save_pretrained(folder)


def _set_template(tokenizer: PreTrainedTokenizerBase, model: PretrainedModel | HotStartModel) -> None:
    if model.system_prompt is not None:
        set_system_prompt(tokenizer, model.system_prompt)
    if model.chat_template_kwargs:
        prepare_chat_template(tokenizer)  # it recognises templates by their text, which the variables change
        set_template_defaults(tokenizer, model.chat_template_kwargs, TEMPLATE_KWARGS)


def _change_config(folder: Path, changes: dict[str, Any]) -> None:
    """Overwrite keys of a checkpoint's config.json with `changes`."""
    if not changes:
        return
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    checked_config(config, "model.config", "change it")
    path.unlink()  # it may be a link to the original checkpoint's file
    write_json(path, config)


def _find_pretrained(model: PretrainedModel) -> Path:
    if model.path == EMBEDDED:
        return embedded_source()
    source = local_path(model.path)
    if source.is_file():
        problem = path_problem(source) or "it is a file. Set the folder of a checkpoint."
        raise UserError(f"model.path: {model.path}: {problem}")
    if not source.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            source = Path(snapshot_download(model.path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            raise UserError(
                f"model.path: '{model.path}' is neither a folder nor a hub id that can be reached from here; "
                "check the spelling, or download the checkpoint and set its folder."
            ) from None
    source = with_base(source)
    _require_known_keys(model.config, check_checkpoint(source).get("model_type", DEFAULT_FAMILY))
    return source


def _require_known_keys(changes: dict[str, Any], model_type: str | None) -> None:
    """Raise `UserError` for keys that the family's configuration does not have. None: not a known family."""
    if changes and model_type is not None and (problems := unknown_keys(changes, model_type)):
        raise UserError(".\n".join(problems) + ".")


def _link_pretrained(source: Path, folder: Path, model: PretrainedModel) -> None:
    """Link to the checkpoint's files instead of copying them, and make the recipe's changes. The original checkpoint is
    not changed."""
    if model.add_tokens:
        weight_files(source)  # refuses an adapter beside its base
    for file in source.iterdir():
        if file.is_file() and file.name != POINTER:
            (folder / file.name).symlink_to(file.resolve())
    if (source / POINTER).is_file():
        write_pointer(folder, folder, base_of(source))
    _change_config(folder, model.config)
    if model.add_tokens:
        add_tokens(folder, model.add_tokens, model.vocab_multiple)
