"""SFT and DPO configurations of LLaMA-Factory (`llamafactory-cli train FILE`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.config.data_files import SUFFIXES
from align.draft.foreign import common
from align.draft.foreign.common import LINEAR_SWITCHES, Importing, Parts
from align.draft.foreign.keys import NO_EFFECT, Keys
from align.errors import UserError

TOOL = "LLaMA-Factory"
LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "simpo": "simpo"}
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
"""{key of `columns` in dataset_info.json: standard column of align} of the alpaca format."""
SHAREGPT = {"messages": "messages", "system": "system", "tools": "tools"}
RANKING = {"chosen": "chosen", "rejected": "rejected"}
DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
OPTIONAL = ("system", "history", "tools")
"""Columns that LLaMA-Factory reads only if dataset_info.json names them; align reads them in any file."""
ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "system_tag": ("system", "system"),
}
"""{tag: (default name, role in align)}."""
KNOWN_KEYS = {("from", "value"), ("role", "content")}
"""Pairs (role_tag, content_tag) that align recognises."""
BNB = ("bnb", "bitsandbytes")
LOGS = "logging and saving"
IGNORED = {
    **dict.fromkeys(
        (
            "output_dir",
            "logging_steps",
            "logging_dir",
            "save_steps",
            "save_strategy",
            "save_total_limit",
            "save_only_model",
            "plot_loss",
            "overwrite_output_dir",
            "report_to",
            "run_name",
            "eval_steps",
            "eval_strategy",
            "evaluation_strategy",
            "per_device_eval_batch_size",
            "do_eval",
            "compute_accuracy",
            "include_num_input_tokens_seen",
        ),
        LOGS,
    ),
    **dict.fromkeys(
        (
            "overwrite_cache",
            "preprocessing_num_workers",
            "preprocessing_batch_size",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "tokenized_path",
            "ddp_timeout",
            "ddp_find_unused_parameters",
            "cache_dir",
            "use_fast_tokenizer",
            "low_cpu_mem_usage",
            "flash_attn",
            "enable_liger_kernel",
            "use_unsloth",
            "use_unsloth_gc",
            "use_reentrant_gc",
            "disable_gradient_checkpointing",
            "media_dir",
            "do_train",
            "deepspeed",
            "tf32",
            "loraplus_lr_embedding",
        ),
        NO_EFFECT,
    ),
    "trust_remote_code": "align runs no code of checkpoints",
    "use_cache": NO_EFFECT,
}
REASONS = {
    "template": "align renders conversations with the checkpoint's own chat template; compare with `align data show`",
    "mask_history": "mark the earlier answers with `train: false` in the data (docs/data.md)",
    "quantization_bit": "the frozen weights are quantized there; the recipe trains on unquantized ones",
    "dpo_label_smoothing": "the smoothed sigmoid loss (cDPO) is not available; the recipe has the plain one",
    "neftune_noise_alpha": "align adds no noise to embeddings",
    "pure_bf16": "trained weights are float32 in align",
    "pissa_init": "the initialisation changes the base weights, which align refuses",
    "rope_scaling": "set model.config.rope_scaling as the family's config.json has it",
    "pref_bco_weight": "align has no mixture of DPO and BCO losses",
    "ld_alpha": "align has no length-desensitised DPO",
    "streaming": "set `streaming: true` in the sources of data.train, and max_steps",
    "buffer_size": "align shuffles a stream within blocks of 10,000 rows",
    "resume_from_checkpoint": "checkpoints of another tool cannot be continued",
    "max_grad_norm": "align always clips",
}


def llama_factory(path: str, values: dict[str, Any], how: Importing) -> tuple[Parts, Keys]:
    """The recipe's parts and the mapping of every key. Raises `UserError` for a value that no recipe can reproduce."""
    keys = Keys(path, values)
    keys.require("stage", ("sft", "dpo"), "only sft and dpo are imported. Write the recipe by hand")
    kinds = ("lora", "full")
    keys.require("finetuning_type", kinds, "align trains all weights or LoRA adapters. Set full or lora")
    for key, fix in (
        ("adapter_name_or_path", "merge the adapter first, and set model_name_or_path to the merged model"),
        ("ref_model", "align's reference is the model at the start of the stage. Remove the key"),
        ("ref_model_adapters", "align's reference is the model at the start of the stage. Remove the key"),
    ):
        keys.require(key, (), fix)
    for key in ("train_from_scratch", "use_dft_loss", "use_galore", "use_apollo", "use_badam", "use_muon", "use_mca"):
        keys.require(key, (False,), "align does not support this. Remove the key if the run does not depend on it")
    kind = str(keys.take("stage", "kind of the stage", "sft"))
    model = keys.take("model_name_or_path", "model.path")
    if not isinstance(model, str):
        raise UserError(f"{path}: model_name_or_path is missing. Add it.")
    parts = Parts(Path(path).stem, keys.whole("seed", "seed", 42) or 0, {"kind": "pretrained", "path": model}, kind)
    length = keys.whole("cutoff_len", "data.max_length", 2048) or 2048
    if kind == "dpo":
        keys.differ("cutoff_len", "longer pairs are truncated there, dropped and counted here")
    data: dict[str, Any] = {"train": _sources(keys, "dataset", kind)}
    if "eval_dataset" in keys:
        data["held_out"] = _sources(keys, "eval_dataset", kind)
    else:
        common.held_out(keys, "val_size", data)
    if "max_samples" in keys:
        most = keys.whole("max_samples", "data.train.limit")
        for source in [*data["train"], *data.get("held_out", [])]:
            source["limit"] = most
        keys.differ("max_samples", "the first rows there, rows drawn with the seed here")
    _mix(keys, data)
    data["max_length"] = length
    stage = parts.stage
    stage["data"] = data
    if kind == "sft":
        stage["assistant_only_loss"] = not keys.flag("train_on_prompt", "assistant_only_loss")
    else:
        _preference(keys, stage)
    parts.dtype = common.precision(keys)
    _lora(keys, parts, how)
    packs = next((key for key in ("packing", "neat_packing") if keys.values.get(key) is True), None)
    if packs:
        keys.ignored.update({key: NO_EFFECT for key in ("packing", "neat_packing") if key in keys and key != packs})
    micro = "per_device_train_batch_size"
    stage |= common.batch(keys, how, micro=micro, default=8, packs=packs, length=length)
    stage |= common.steps_of(keys, "num_train_epochs", 3.0)
    names = {"schedule": "lr_scheduler_type", "default": "linear", "optim": "optim"}
    stage["optimizer"] = common.optimizer(keys, rate=5e-5, **names)
    common.warmup(keys, stage["optimizer"], schedule="lr_scheduler_type", max_steps=stage.get("max_steps"))
    if keys.flag("group_by_length", "group_by_length"):
        stage["group_by_length"] = True
    stage["gradient_checkpointing"] = not keys.values.get("disable_gradient_checkpointing", False)
    parts.parallel = common.processes(keys, how)
    keys.finish(IGNORED, REASONS)
    return parts, keys


def _preference(keys: Keys, stage: dict[str, Any]) -> None:
    accepted = (*LOSSES,)
    keys.require("pref_loss", accepted, f"align has the losses {', '.join(LOSSES)} of those that exist there")
    stage["loss_type"] = LOSSES[str(keys.take("pref_loss", "loss_type", "sigmoid"))]
    stage["beta"] = keys.number("pref_beta", "beta", 0.1)
    if stage["loss_type"] == "simpo":
        stage["simpo_gamma"] = keys.number("simpo_gamma", "simpo_gamma", 0.5)
    elif "simpo_gamma" in keys:
        keys.ignored["simpo_gamma"] = "used by simpo only"
    if weight := keys.number("pref_ftx", "sft_coef"):
        stage["sft_coef"] = weight
        keys.differ("pref_ftx", "the mean over completions of their mean per token there, the mean over tokens here")


def _lora(keys: Keys, parts: Parts, how: Importing) -> None:
    if keys.take("finetuning_type", "lora", "lora") == "full":
        return
    rank = keys.whole("lora_rank", "lora.rank", 8) or 8
    targets = keys.words("lora_target", "lora.targets") or ["all"]
    section = common.lora(
        LINEAR_SWITCHES if targets == ["all"] else targets,
        rank=rank,
        alpha=keys.number("lora_alpha", "lora.alpha", 2 * rank) or 2 * rank,
        dropout=keys.number("lora_dropout", "lora.dropout") or 0.0,
        dora=keys.flag("use_dora", "lora.dora"),
        rslora=keys.flag("use_rslora", "lora.rslora"),
    )
    if targets == ["all"]:
        keys.differ("lora_target", common.linear_difference(section))
    nf4 = keys.values.get("quantization_type", "nf4") == "nf4"
    if keys.values.get("quantization_bit") == 4 and nf4 and keys.values.get("quantization_method", "bnb") in BNB:
        common.quantize(keys, "quantization_bit", section, how)
        for key in ("quantization_type", "quantization_method"):
            keys.take(key, "lora.quantize")
        if keys.values.get("double_quantization") is False:
            keys.differs.pop("quantization_bit", None)
    if "additional_target" in keys:
        common.full_modules(keys, "additional_target", section)
    parts.stage["lora"] = section
    added = keys.words("add_special_tokens", "model.add_tokens")
    if added:
        parts.model["add_tokens"] = added
        section["targets"] = list(dict.fromkeys([*section["targets"], "embeddings"]))
        keys.differ("add_special_tokens", "noise around the mean of the embeddings there, the mean here; trained here")


def _mix(keys: Keys, data: dict[str, Any]) -> None:
    strategy = keys.take("mix_strategy", "data.mixture")
    if strategy in (None, "concat"):
        return
    stop = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}.get(str(strategy))
    if stop is None:
        keys.reject("mix_strategy", "align concatenates, or draws rows by weights; the recipe concatenates")
        return
    shares = keys.take("interleave_probs", "data.train.weight")
    words = shares.split(",") if isinstance(shares, str) else shares or [1.0] * len(data["train"])
    try:
        numbers = [float(word) for word in words]
    except (TypeError, ValueError):
        raise keys.error("interleave_probs", "not a list of numbers. Correct it") from None
    if len(numbers) != len(data["train"]):
        raise keys.error("interleave_probs", f"not one number for each of {len(data['train'])} data sets. Correct it")
    for source, share in zip(data["train"], numbers):
        source["weight"] = share
    data["mixture"] = {"stop": stop}


def _sources(keys: Keys, key: str, kind: str) -> list[dict[str, Any]]:
    """Sources of the data sets named by a key, from their entries in dataset_info.json."""
    names = keys.words(key, f"data.{'train' if key == 'dataset' else 'held_out'}")
    if not names:
        raise UserError(f"{keys.path}: {key} is missing. Add the names of the data sets.")
    folder, entries = _dataset_info(keys)
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise UserError(
            f"{keys.path}: {key}: '{unknown[0]}' is not in {folder / 'dataset_info.json'}. "
            "Correct dataset_dir, or run the command in the folder where you run LLaMA-Factory."
        )
    return [_source(keys, name, entries[name], folder, kind) for name in names]


def _dataset_info(keys: Keys) -> tuple[Path, dict[str, Any]]:
    folder = Path(str(keys.take("dataset_dir", "paths of data.train") or "data"))
    places = [folder, *(parent / folder for parent in Path(keys.path).resolve().parents)]
    for place in places:
        file = place / "dataset_info.json"
        if file.is_file():
            try:
                return place, dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                raise UserError(f"{file}: not a JSON object. Correct the file.") from None
    return folder, {}


def _source(keys: Keys, name: str, entry: Any, folder: Path, kind: str) -> dict[str, Any]:
    where = f"{keys.path}: data set '{name}'"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: its entry in dataset_info.json is not an object. Correct it.")
    source: dict[str, Any]
    if "hf_hub_url" in entry:
        source = {"kind": "hub", "id": entry["hf_hub_url"]}
        source |= {"name": entry["subset"]} if entry.get("subset") else {}
        source |= {"split": entry["split"]} if entry.get("split") else {}
        if entry.get("folder"):
            raise UserError(f"{where}: `folder` of a hub data set is not imported. Download it, and name its files.")
    elif isinstance(entry.get("file_name"), str):
        source = {"path": str(folder / entry["file_name"])}
        if Path(entry["file_name"]).suffix and Path(entry["file_name"]).suffix not in SUFFIXES:
            raise UserError(
                f"{where}: {entry['file_name']} is not a format that align reads. Convert it to JSON Lines."
            )
    else:
        raise UserError(f"{where}: it is neither a file nor a data set of the Hugging Face hub. Download it.")
    if bool(entry.get("ranking")) != (kind == "dpo"):
        raise UserError(f"{where}: `ranking` is {bool(entry.get('ranking'))}, which does not fit stage {kind}.")
    if entry.get("images") or entry.get("videos") or {"images", "videos", "audios"} & set(entry.get("columns") or {}):
        raise UserError(f"{where}: images, videos and audio are not trained on. Choose a data set of texts.")
    shape = entry.get("formatting", "alpaca")
    if shape not in DEFAULT_COLUMNS:
        raise UserError(f"{where}: formatting '{shape}' is not imported. Convert the rows with `align data convert`.")
    standard = ALPACA | SHAREGPT | RANKING
    columns = {**DEFAULT_COLUMNS[shape], **(entry.get("columns") or {})}
    if kind == "dpo" and shape == "alpaca":
        columns.pop("response", None)
    if other := [column for column in columns if column not in standard]:
        raise UserError(f"{where}: column '{other[0]}' is not imported. Remove it from `columns`.")
    renamed = {standard[role]: column for role, column in columns.items() if column and standard[role] != column}
    renamed = {new: old for new, old in renamed.items() if (new, old) != ("messages", "conversations")}
    source |= {"columns": renamed} if renamed else {}
    used = {column for column in columns.values() if column}
    source["ignore"] = [column for column in OPTIONAL if column not in used]
    if roles := _roles(entry.get("tags") or {}, where):
        source["roles"] = roles
    return source


def _roles(tags: dict[str, Any], where: str) -> dict[str, str]:
    pair = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
    if pair not in KNOWN_KEYS:
        raise UserError(
            f"{where}: messages with the keys {pair[0]} and {pair[1]} are not read. Rename them in the data."
        )
    known = {"human", "user", "gpt", "assistant", "observation", "tool", "system"}
    return {str(tags[tag]): role for tag, (_, role) in ROLES.items() if tag in tags and tags[tag] not in known}
