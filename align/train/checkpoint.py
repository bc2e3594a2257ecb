"""Load and save models and tokenizers, with errors before any memory is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

import align.models  # noqa: F401 (registers HunYuan)
from align.data.chat import prepare_chat_template
from align.errors import UserError
from align.models.hunyuan import HunYuanConfig
from align.models.lora import AnyModel, merge_lora
from align.train.run_folder import replace_folder

SEQUENCE_CLASSIFIER = "HunYuanForSequenceClassification"


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The config.json of a HunYuan checkpoint whose weights are safetensors; raises `UserError` for anything else."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json there; give the folder of a checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON; the checkpoint is damaged.") from None
    kind = config.get("model_type")
    if kind != HunYuanConfig.model_type:
        raise UserError(
            f"{folder}: a checkpoint of type '{kind}', but align trains '{HunYuanConfig.model_type}' models; "
            "a Llama-type one can be grown with `align convert hot-start`."
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no safetensors file there; convert the weights (pickled ones are never loaded).")
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer with a template that marks assistant turns; checks that its ids fit the embedding."""
    config = check_checkpoint(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"{folder}: no tokenizer there; copy tokenizer.json and tokenizer_config.json into it.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > config["vocab_size"]:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries but the model's vocabulary only "
            f"{config['vocab_size']}; they do not belong together."
        )
    prepare_chat_template(tokenizer)
    return tokenizer


def load_policy(folder: Path, dtype: str) -> AnyModel:
    """A causal language model."""
    config = check_checkpoint(folder)
    if SEQUENCE_CLASSIFIER in (config.get("architectures") or []):
        raise UserError(f"{folder}: a reward model, where a language model is needed; name the stage that trained one.")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def load_scorer(folder: Path, dtype: str, *, fresh_head: bool = False) -> AnyModel:
    """A model with one scalar head, for the reward model and the critic.

    From a language model, or with `fresh_head`, the head starts at zero: every score is then 0 until it learns,
    instead of
    noise that depends on the hidden size.
    """
    check_checkpoint(folder)
    settings = AutoConfig.from_pretrained(folder, num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=settings, dtype=getattr(torch, dtype))
    if fresh_head:
        nn.init.zeros_(model.score.weight)
    return model


def save_model(model: AnyModel, tokenizer: PreTrainedTokenizerBase, stage_dir: Path) -> AnyModel:
    """Write stage_dir/model (merged, complete) and, for LoRA, stage_dir/adapter. Returns the merged model."""
    is_peft = hasattr(model, "peft_config")
    if is_peft:
        replace_folder(stage_dir / "adapter", lambda folder: model.save_pretrained(folder))
    merged = merge_lora(model)

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    replace_folder(stage_dir / "model", write)
    return merged


def count_parameters(model: AnyModel) -> dict[str, int]:
    """Total, active (a token's routed share) and trainable parameters; call it before adapters are merged."""
    total = active = trainable = 0
    config = model.config
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            trainable += parameter.numel() if parameter.requires_grad else 0
            continue
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
        share = 1.0
        if ".experts." in name and parameter.ndim == 3:
            layer = int(name.split("layers.")[1].split(".")[0])
            share = config.top_k_in(layer) / config.experts_in(layer)
        active += int(parameter.numel() * share)
    return {"total": total, "active": active, "trainable": trainable}
