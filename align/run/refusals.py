"""Refuse checkpoints that are not a causal language model with plain weights, by their config.json and file names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from align.config.families import TABLE
from align.config.stage import LANGUAGE_MODEL, REWARD_MODEL
from align.run.peft_folder import CONFIG, is_peft_folder, local_base, named_base

ENCODERS = frozenset(
    {"albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "longformer"}
    | {"modernbert", "mpnet", "nomic_bert", "rembert", "roberta", "roberta-prelayernorm", "xlm-roberta"}
)
"""`model_type`s of encoders. Others are recognised by their class in `architectures`."""
_TEXT_PARTS = ("text_config", "language_config", "llm_config", "thinker_config")
_OTHER_PARTS = ("vision_config", "audio_config", "vision_tower_config", "speech_config")
_SCORER = "ForSequenceClassification"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
"""Files that transformers can load a tokenizer from; one is enough."""
IS_REWARD_MODEL = "it is a reward model; use the checkpoint of a language model."
IS_LANGUAGE_MODEL = "it is a language model; use the checkpoint of a reward model."


def path_problem(path: Path) -> str | None:
    """Reason why a file, or a folder without config.json, cannot be used, with what to do; None if there is none."""
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    if any(file.suffix == ".gguf" for file in files):
        return (
            "GGUF, a format for inference with quantized weights. Use the safetensors checkpoint that it was made from."
        )
    if is_peft_folder(path) and local_base(path) is None:
        base = named_base(path)
        reason = f"{base!r} is not a folder of this machine" if base else "is not known"
        return (
            f"an adapter, and its base model {reason}. Write the base's folder as base_model_name_or_path into "
            f"{path / CONFIG}."
        )
    return None


def tokenizer_problem(folder: Path) -> str | None:
    """Reason why no tokenizer can be loaded from a checkpoint's folder, if it has none of the files."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return "it has no tokenizer; copy tokenizer.json and tokenizer_config.json into it."


def config_problem(config: Mapping[str, Any], known: Collection[str] | None = None) -> str | None:
    """Reason why a checkpoint with these values in config.json cannot be used, with what to do; None if it can.

    known: the supported `model_type`s; None leaves the type unchecked.
    """
    kind = config.get("model_type")
    if problem := quantized_problem(config):
        return problem
    if known is not None and kind in known:
        return None
    if config.get("is_encoder_decoder") is True:
        return f"'{kind}' is an encoder-decoder. Use a decoder-only language model."
    if kind in ENCODERS or _has_head(config, "ForMaskedLM"):
        return f"'{kind}' is an encoder, which does not generate text. Use a decoder-only language model."
    if is_multimodal(config):
        return _multimodal(config)
    if known is None:
        return None
    if code := config.get("auto_map"):
        return (
            f"'{kind}' needs Python code from the checkpoint (auto_map: {_code(code)}), which is never run; "
            "docs/families.md lists the model types that need none."
        )
    return f"its model_type is '{kind}', which align does not know; docs/families.md lists the model types."


def quantized_problem(config: Mapping[str, Any]) -> str | None:
    """Reason why quantized weights cannot be used, with what to do; None if the weights are not quantized."""
    quantized = config.get("quantization_config") or config.get("compression_config")
    if not quantized:
        return None
    return (
        f"its weights are quantized ({_method(quantized)}), and quantized weights cannot be trained. Use the "
        "checkpoint in bfloat16, or save a dequantized copy of this one with transformers."
    )


def zero_3_problem(model_type: str | None) -> str | None:
    """Reason why ZeRO-3 cannot shard the models of a family, with what to do, if any."""
    if model_type not in TABLE or not TABLE[model_type].convolutions:
        return None
    return (
        f"parallel.zero_stage 3: transformers reads the convolutions of '{model_type}' models outside their modules, "
        "so their weights cannot be sharded. Set parallel.zero_stage to 2."
    )


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """True if config.json describes a language model together with parts for images, audio or video."""
    return any(isinstance(config.get(part), Mapping) for part in (*_TEXT_PARTS, *_OTHER_PARTS))


def is_scorer(config: Mapping[str, Any]) -> bool:
    """True if config.json declares a reward model: one scalar head instead of a language model's."""
    return _has_head(config, _SCORER)


def role_problem(config: Mapping[str, Any], accepted: Collection[str]) -> str | None:
    """Reason why a checkpoint is not one of the accepted kinds of results, with what to do; None if it is."""
    if (REWARD_MODEL in accepted and LANGUAGE_MODEL in accepted) or not config.get("architectures"):
        return None
    if is_scorer(config) != (REWARD_MODEL in accepted):
        return IS_REWARD_MODEL if is_scorer(config) else IS_LANGUAGE_MODEL
    return None


def _has_head(config: Mapping[str, Any], suffix: str) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and any(isinstance(name, str) and name.endswith(suffix) for name in names)


def _method(quantized: Any) -> str:
    if not isinstance(quantized, Mapping):
        return "quantization_config"
    method, bits = quantized.get("quant_method", "quantization_config"), quantized.get("bits")
    bits = bits or next((size for size in (4, 8) if quantized.get(f"load_in_{size}bit")), None)
    return f"{method}, {bits} bits" if bits else str(method)


def _multimodal(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    text = next((part for name in _TEXT_PARTS if isinstance(part := config.get(name), Mapping)), None)
    inner = f" (model_type '{text['model_type']}')" if text and text.get("model_type") else ""
    return (
        f"'{kind}' is a multimodal model; only its language model{inner} can be trained. Extract it with "
        "`align convert language-model SRC DST`, and use DST."
    )


def _code(auto_map: Any) -> str:
    if not isinstance(auto_map, Mapping):
        return str(auto_map)
    return str(auto_map.get("AutoModelForCausalLM") or next(iter(auto_map.values()), ""))
