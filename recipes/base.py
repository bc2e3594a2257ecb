"""The model that every chain starts from: loaded, grown from a dense one, or made from scratch."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import assert_never

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.config.parts import HotStartModel, PretrainedModel, ScratchModel
from align.data import corpus, train_tokenizer
from align.data.chat import set_system_prompt
from align.errors import UserError
from align.models.hot_start import convert_hot_start
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.train.checkpoint import check_checkpoint, checked_config, count_parameters, load_policy
from align.train.run_folder import StageContext, remove_folder, replace_folder


def run(context: StageContext) -> dict:
    """Write <run>/base/model; the pipeline treats it as a stage of its own."""
    model, target = context.recipe.model, context.run_dir / "base" / "model"
    if isinstance(model, ScratchModel):
        replace_folder(target, lambda folder: _from_scratch(model, context.recipe.seed, folder))
    elif isinstance(model, HotStartModel):
        remove_folder(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        convert_hot_start(
            model.source,
            target,
            experts=model.experts,
            top_k=model.top_k,
            expert_width=model.expert_width,
            seed=context.recipe.seed,
        )
        if model.system_prompt is not None:
            tokenizer = AutoTokenizer.from_pretrained(target)
            set_system_prompt(tokenizer, model.system_prompt)
            tokenizer.save_pretrained(target)
    elif isinstance(model, PretrainedModel):
        _link_pretrained(model, target)
    else:
        assert_never(model)
    parameters = count_parameters(load_policy(target, context.recipe.dtype))
    context.say(f"  {parameters['total']:,} parameters, {parameters['active']:,} active a token")
    return {"metrics": {}, "data": {}, "parameters": parameters}


def _from_scratch(settings: ScratchModel, seed: int, folder: Path) -> None:
    tokenizer: PreTrainedTokenizerBase
    if isinstance(settings.tokenizer, str):
        try:
            tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
        except (OSError, ValueError):
            raise UserError(
                f"model.tokenizer: no tokenizer can be loaded from '{settings.tokenizer}'; give a folder that holds "
                "tokenizer.json, or a section with vocab_size and data to train one."
            ) from None
    else:
        texts = corpus(settings.tokenizer.data, seed=seed)
        tokenizer = train_tokenizer(texts, settings.tokenizer.vocab_size)
    unknown = sorted(set(settings.config) - set(HunYuanConfig.__dataclass_fields__))
    if unknown:
        near = get_close_matches(unknown[0], HunYuanConfig.__dataclass_fields__, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise UserError(f"model.config: '{unknown[0]}' is not a key of a HunYuan configuration{hint}")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ids, **settings.config}
    config = checked_config(values, "model.config", "change it")
    torch.manual_seed(seed)
    HunYuanForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _link_pretrained(model: PretrainedModel, target: Path) -> None:
    source = Path(model.path)
    if not source.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            source = Path(snapshot_download(model.path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            raise UserError(
                f"model.path: '{model.path}' is neither a folder nor a hub id that can be reached from here; "
                "check the spelling, or download the checkpoint and give its folder."
            ) from None
    check_checkpoint(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_folder(target)
    target.symlink_to(source.resolve(), target_is_directory=True)
