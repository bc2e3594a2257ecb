"""SFT and DPO configurations of axolotl (`axolotl train FILE`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.config.data_files import SUFFIXES
from align.draft.foreign import common
from align.draft.foreign.common import LINEAR_SWITCHES, Importing, Parts
from align.draft.foreign.keys import NO_EFFECT, Keys
from align.errors import UserError

TOOL = "axolotl"
LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}
"""{value of `rl`: loss_type}."""
LOGS = "logging and saving"
IGNORED = {
    **dict.fromkeys(
        (
            "output_dir",
            "logging_steps",
            "save_steps",
            "saves_per_epoch",
            "save_strategy",
            "save_total_limit",
            "save_safetensors",
            "save_only_model",
            "eval_steps",
            "evals_per_epoch",
            "eval_strategy",
            "eval_batch_size",
            "eval_sample_packing",
            "eval_table_size",
            "eval_max_new_tokens",
            "wandb_project",
            "wandb_entity",
            "wandb_watch",
            "wandb_name",
            "wandb_run_id",
            "wandb_log_model",
            "use_tensorboard",
            "hub_model_id",
            "hub_strategy",
            "debug",
            "include_tokens_per_second",
        ),
        LOGS,
    ),
    **dict.fromkeys(
        (
            "model_type",
            "tokenizer_type",
            "tokenizer_use_fast",
            "is_llama_derived_model",
            "is_mistral_derived_model",
            "is_qwen_derived_model",
            "dataset_prepared_path",
            "dataset_processes",
            "dataset_num_proc",
            "dataset_keep_in_memory",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "pad_to_sequence_len",
            "flash_attention",
            "sdp_attention",
            "xformers_attention",
            "flex_attention",
            "eager_attention",
            "attn_implementation",
            "flash_attn_cross_entropy",
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
            "gradient_checkpointing_kwargs",
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "fsdp_version",
            "low_cpu_mem_usage",
            "torch_compile",
            "tf32",
            "strict",
            "sample_packing_group_size",
            "sample_packing_bin_size",
            "loraplus_lr_embedding",
            "plugins",
            "liger_rope",
            "liger_rms_norm",
            "liger_glu_activation",
            "liger_layer_norm",
            "liger_fused_linear_cross_entropy",
        ),
        NO_EFFECT,
    ),
    "trust_remote_code": "align runs no code of checkpoints",
    "shuffle_merged_datasets": "align always shuffles",
}
REASONS = {
    "load_in_4bit": "the frozen weights are quantized there; the recipe trains on unquantized ones",
    "load_in_8bit": "the frozen weights are quantized there; the recipe trains on unquantized ones",
    "special_tokens": "align keeps the tokenizer's special tokens; turns end with the token of the chat template",
    "neftune_noise_alpha": "align adds no noise to embeddings",
    "cosine_min_lr_ratio": "align's cosine ends at 0",
    "cosine_constant_lr_ratio": "align's cosine ends at 0",
    "early_stopping_patience": "align trains all steps; data.held_out measures the loss during training",
    "resume_from_checkpoint": "checkpoints of another tool cannot be continued",
    "default_system_message": "set model.system_prompt for a ChatML template, or system_prompt of a source",
    "rpo_alpha": "its loss term is normalised differently from align's sft_coef",
    "dataset_exact_deduplication": "add {kind: duplicates} to data.filters, which also finds near duplicates",
    "chat_template_jinja": "save the template as chat_template.jinja in the checkpoint's folder",
    "min_sample_len": "add {kind: length} to data.filters",
    "revision_of_model": "download the revision, and set base_model to its folder",
    "dpo_label_smoothing": "the smoothed sigmoid loss (cDPO) is not available; the recipe has the plain one",
}
KNOWN_KEYS = {("from", "value"), ("role", "content")}
SFT_KEYS = {"path", "type", "split", "name", "data_files", "ds_type", "field", "field_messages", "roles", "field_tools"}
SFT_KEYS |= {"message_property_mappings", "message_field_role", "message_field_content", "chat_template"}
SFT_KEYS |= {"roles_to_train", "train_on_eos", "field_chosen", "field_rejected", "trust_remote_code"}


def axolotl(path: str, values: dict[str, Any], how: Importing) -> tuple[Parts, Keys]:
    """The recipe's parts and the mapping of every key. Raises `UserError` for a value that no recipe can reproduce."""
    keys = Keys(path, values)
    keys.require("rl", tuple(LOSSES), f"only SFT and {' and '.join(LOSSES)} are imported. Write the recipe by hand")
    keys.require("adapter", ("lora", "qlora"), "align trains all weights or LoRA adapters. Set lora, or remove the key")
    for key in ("lora_model_dir",):
        keys.require(key, (), "merge the adapter first, and set base_model to the merged model")
    for key in ("reward_model", "process_reward_model", "pretraining_dataset", "unfrozen_parameters", "relora", "qat"):
        keys.require(key, (False,), "this way of training is not imported. Write the recipe by hand")
    keys.require("batch_size", (), "set micro_batch_size and gradient_accumulation_steps instead")
    kind = "dpo" if "rl" in keys else "sft"
    model = keys.take("base_model", "model.path")
    if not isinstance(model, str):
        raise UserError(f"{path}: base_model is missing. Add it.")
    parts = Parts(Path(path).stem, keys.whole("seed", "seed", 42) or 0, {"kind": "pretrained", "path": model}, kind)
    length = keys.whole("sequence_len", "data.max_length", 512) or 512
    drops = keys.take("excess_length_strategy", "data.max_length") != "truncate"
    if kind == "sft" and drops:
        keys.differ("sequence_len", "longer rows are dropped there, truncated and counted here")
    if kind == "dpo" and not drops:
        keys.reject("excess_length_strategy", "align drops pairs that are longer than max_length")
    train, texts = _sources(keys, "datasets", kind)
    data: dict[str, Any] = {"train": train}
    if "test_datasets" in keys:
        data["held_out"], _ = _sources(keys, "test_datasets", kind)
    else:
        common.held_out(keys, "val_set_size", data)
    data["max_length"] = length
    stage = parts.stage
    stage["data"] = data
    if kind == "sft":
        stage["assistant_only_loss"] = not (keys.flag("train_on_inputs", "assistant_only_loss") or texts)
    else:
        keys.mapped["rl"] = "loss_type"
        stage["loss_type"] = LOSSES[str(keys.values["rl"])]
        stage["beta"] = _beta(keys)
        if "train_on_inputs" in keys:
            keys.ignored["train_on_inputs"] = "the loss of pairs is on completions in both"
    _template(keys)
    parts.dtype = common.precision(keys)
    _lora(keys, parts, how)
    packs = "sample_packing" if keys.values.get("sample_packing") is True else None
    stage |= common.batch(keys, how, micro="micro_batch_size", default=1, packs=packs, length=length)
    stage |= common.steps_of(keys, "num_epochs", 1.0)
    names = {"schedule": "lr_scheduler", "default": "cosine", "optim": "optimizer"}
    stage["optimizer"] = common.optimizer(keys, rate=None, **names)
    if stage["optimizer"]["learning_rate"] is None:
        raise UserError(f"{path}: learning_rate is missing. Add it.")
    common.warmup(keys, stage["optimizer"], schedule="lr_scheduler", max_steps=stage.get("max_steps"))
    if not {"warmup_steps", "warmup_ratio"} & set(keys.values) and "warmup_fraction" in stage["optimizer"]:
        stage["optimizer"]["warmup_fraction"] = 0.03
        keys.defaults["warmup_ratio"] = (
            "optimizer.warmup_fraction is 0.03; the default there is 0.03, at most 100 steps"
        )
    if keys.flag("group_by_length", "group_by_length"):
        stage["group_by_length"] = True
    checkpointing = keys.take("gradient_checkpointing", "gradient_checkpointing")
    stage["gradient_checkpointing"] = checkpointing not in (None, False)
    added = keys.words("tokens", "model.add_tokens")
    if added:
        parts.model["add_tokens"] = added
        keys.differ("tokens", "their embeddings start as the mean of all others, and are trained")
        if "lora" in stage:
            stage["lora"]["targets"] = list(dict.fromkeys([*stage["lora"]["targets"], "embeddings"]))
    parts.parallel = common.processes(keys, how)
    keys.finish(IGNORED, REASONS)
    return parts, keys


def _beta(keys: Keys) -> float:
    nested = keys.values.get("trl")
    if isinstance(nested, dict) and set(nested) == {"beta"}:
        keys.mapped["trl"] = "beta"
        return float(nested["beta"])
    if "dpo_beta" in keys and "rl_beta" not in keys:
        return keys.number("dpo_beta", "beta") or 0.1
    return keys.number("rl_beta", "beta", 0.1) or 0.1


def _template(keys: Keys) -> None:
    name = keys.take("chat_template", "the checkpoint's chat template")
    if name not in (None, "tokenizer_default"):
        keys.reject(
            "chat_template",
            "align renders conversations with the checkpoint's own chat template; compare with `align data show`",
        )


def _lora(keys: Keys, parts: Parts, how: Importing) -> None:
    adapter = keys.take("adapter", "lora")
    if adapter is None:
        for key in [key for key in keys.values if key.startswith(("lora_", "peft_"))]:
            keys.ignored[key] = "no adapter is trained"
        return
    rank = keys.whole("lora_r", "lora.rank")
    if rank is None:
        raise UserError(f"{keys.path}: lora_r is missing. Add it.")
    alpha = keys.number("lora_alpha", "lora.alpha")
    if alpha is None:
        raise UserError(f"{keys.path}: lora_alpha is missing. Add it.")
    everything = keys.flag("lora_target_linear", "lora.targets")
    targets = keys.words("lora_target_modules", "lora.targets")
    if not everything and not targets:
        raise UserError(f"{keys.path}: lora_target_modules is missing. Add it, or lora_target_linear: true.")
    section = common.lora(
        LINEAR_SWITCHES if everything else targets,
        rank=rank,
        alpha=alpha,
        dropout=keys.number("lora_dropout", "lora.dropout") or 0.0,
        dora=keys.flag("peft_use_dora", "lora.dora"),
        rslora=keys.flag("peft_use_rslora", "lora.rslora"),
    )
    if everything:
        keys.differ("lora_target_linear", common.linear_difference(section))
    if keys.values.get("load_in_4bit") is True:
        common.quantize(keys, "load_in_4bit", section, how)
    if layers := keys.take("peft_layers_to_transform", "lora.layers"):
        section["layers"] = layers
    if "lora_modules_to_save" in keys:
        common.full_modules(keys, "lora_modules_to_save", section)
    parts.stage["lora"] = section


def _sources(keys: Keys, key: str, kind: str) -> tuple[list[dict[str, Any]], bool]:
    """(sources, True if they are plain texts with all tokens in the loss)."""
    entries = keys.take(key, f"data.{'train' if key == 'datasets' else 'held_out'}")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{keys.path}: {key} is not a list of data sets. Correct it.")
    found = [_source(keys, f"{key}.{number}", entry, kind) for number, entry in enumerate(entries)]
    texts = {text for _, text in found}
    if len(texts) > 1:
        raise UserError(f"{keys.path}: {key}: a mixture of texts and conversations is not imported. Split the file.")
    return [source for source, _ in found], texts == {True}


def _source(keys: Keys, where: str, entry: dict[str, Any], kind: str) -> tuple[dict[str, Any], bool]:
    values = {key: value for key, value in entry.items() if value is not None}
    for key in [key for key in values if key not in SFT_KEYS]:
        keys.not_mapped[f"{where}.{key}"] = "align has no setting for it"
    source = _place(keys, where, values)
    columns: dict[str, str] = {}
    shape = values.get("type", "chat_template" if kind == "sft" else "chat_template.default")
    text = False
    if shape == "chat_template" and kind == "sft":
        columns = {"messages": values.get("field_messages", "messages")}
        _messages(keys, where, values)
        if values.get("field_tools", "tools") != "tools":
            columns["tools"] = values["field_tools"]
    elif shape == "alpaca" and kind == "sft":
        keys.not_mapped[f"{where}.type"] = (
            "the rows are read, but rendered with the chat template instead of Alpaca's text"
        )
    elif shape == "completion" and kind == "sft":
        columns, text = {"text": values.get("field", "text")}, True
    elif shape == "chat_template.default" and kind == "dpo":
        columns = {"messages": values.get("field_messages", "messages")}
        columns |= {name: values.get(f"field_{name}", name) for name in ("chosen", "rejected")}
        _messages(keys, where, values)
    elif isinstance(shape, str) and shape.endswith(".prompt_pairs") and kind == "dpo":
        _named_template(keys, where, shape)
    elif isinstance(shape, str) and shape.endswith(".intel") and kind == "dpo":
        columns = {"prompt": "question"}
        _named_template(keys, where, shape)
    else:
        raise UserError(
            f"{keys.path}: {where}.type: {shape}: this type is not imported. Convert the rows with `align data "
            "convert`, and name the result."
        )
    if renamed := {new: old for new, old in columns.items() if new != old}:
        source["columns"] = renamed
    if roles := _roles(values.get("roles") or {}):
        source["roles"] = roles
    if not text:  # align would read these columns, axolotl does not
        used = {"system"} if isinstance(shape, str) and shape.endswith(".intel") else set()
        source["ignore"] = [column for column in ("system", "history") if column not in {*used, *columns.values()}]
    return source, text


def _place(keys: Keys, where: str, values: dict[str, Any]) -> dict[str, Any]:
    path, files = values.get("path"), values.get("data_files")
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    if files is not None and not isinstance(files, str):
        raise UserError(f"{keys.path}: {where}.data_files: several files are not imported. Make one entry of each.")
    if not isinstance(path, str):
        raise UserError(f"{keys.path}: {where}.path is missing. Add it.")
    local = files if files is not None and path in ("json", "csv", "parquet", "arrow", "text") else path
    is_file = Path(local).suffix in SUFFIXES or "ds_type" in values or Path(local).exists()
    if is_file:
        return {"path": local}
    if files is not None:
        raise UserError(f"{keys.path}: {where}.data_files: files of a hub data set are not imported. Download them.")
    named = {"name": values["name"]} if "name" in values else {}
    return {"kind": "hub", "id": path, **named, "split": values.get("split", "train")}


def _messages(keys: Keys, where: str, values: dict[str, Any]) -> None:
    """Refuse message keys that align does not read; report loss settings that it lacks as not mapped."""
    names = dict(values.get("message_property_mappings") or {})
    pair = (
        names.get("role", values.get("message_field_role", "role")),
        names.get("content", values.get("message_field_content", "content")),
    )
    if pair not in KNOWN_KEYS:
        raise UserError(
            f"{keys.path}: {where}: messages with the keys {pair[0]} and {pair[1]} are not read. Rename them in the "
            "data."
        )
    if values.get("roles_to_train", ["assistant"]) not in (["assistant"], ["gpt"], ["assistant", "gpt"]):
        keys.not_mapped[f"{where}.roles_to_train"] = "the loss is on assistant turns; `train` in a message changes it"
    if values.get("train_on_eos", "turn") != "turn":
        keys.not_mapped[f"{where}.train_on_eos"] = "the end-of-turn token of every assistant turn is in the loss"
    if values.get("chat_template", "tokenizer_default") != "tokenizer_default":
        keys.not_mapped[f"{where}.chat_template"] = "align renders with the checkpoint's own chat template"


def _named_template(keys: Keys, where: str, shape: str) -> None:
    keys.not_mapped[f"{where}.type"] = (
        f"the rows are read, but rendered with the checkpoint's chat template instead of {shape.partition('.')[0]}'s"
    )


def _roles(roles: dict[str, Any]) -> dict[str, str]:
    """{role name in the file: role} for the names that align does not know."""
    known = {"human", "user", "gpt", "assistant", "system", "tool", "observation"}
    return {str(name): role for role, names in roles.items() for name in names if name not in known}
