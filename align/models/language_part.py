"""Extract the language model of a multimodal checkpoint: its tensors under their own names, and its config.json."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from align.errors import UserError
from align.models.family import family, model_types
from align.models.weight_files import weight_files
from align.models.weights import check_weights
from align.run.folder import replace_folder, write_json

PREFIXES = {"language_model.": "", "model.language_model.": "model.", "lm_head.": "lm_head."}
PREFIXES |= {name: name for name in ("model.embed_tokens.", "model.layers.", "model.norm.")}
"""{prefix of tensor names in a multimodal checkpoint: prefix in the language model's own checkpoint}."""
FOR_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""{`model_type` of a language model inside a multimodal model: the family that computes the same for text}.

Qwen-VL's rotary embeddings have three positions per token, which are equal for text."""
COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Suffixes of the tokenizer's files."""
LEFT_OUT = ("config.json", "model.safetensors.index.json", "preprocessor_config.json", "processor_config.json")


def convert_language_model(source: Path, target: Path, config: Mapping[str, Any]) -> Path:
    """Write the language model of the multimodal checkpoint `source` to `target`; returns `target`.

    Given text alone, the new checkpoint computes what the multimodal model does.

    config: the checkpoint's config.json.
    """
    text = _text_config(config)
    kind = text.get("model_type") if text is not None else None
    if text is None or kind not in model_types():
        part = f"its language model is of the model_type '{kind}'" if kind else "config.json has no text_config"
        raise UserError(f"{source}: {part}, which align does not know; docs/families.md lists the model types.")
    replace_folder(target, partial(_write, source, text))
    return target


def _text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values of the language model's own config.json; None if there is no language model."""
    text = config.get("text_config")
    if text is None and f"{config.get('model_type')}_text" in FOR_TEXT:
        # Published Qwen2-VL checkpoints have the keys of the language model beside vision_config.
        text = CONFIG_MAPPING[config["model_type"]](**config).text_config.to_dict()
    if not isinstance(text, Mapping):
        return None
    kind = text.get("model_type")
    if kind not in FOR_TEXT:
        return dict(text)
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope = {key: value for key, value in rope.items() if not key.startswith("mrope") and key != "type"}
    theta = rope.get("rope_theta", text.get("rope_theta"))
    plain = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_theta")}
    rope |= {"rope_type": "default"} | ({} if theta is None else {"rope_theta": theta})
    return {**plain, "model_type": FOR_TEXT[kind], "rope_parameters": rope}


def _write(source: Path, text: dict[str, Any], folder: Path) -> None:
    names: dict[str, str] = {}
    for file in weight_files(source):
        tensors = _language_tensors(file)
        if tensors:
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            names |= dict.fromkeys(tensors, file.name)
    if not names:
        raise UserError(f"{source}: no tensor belongs to a language model; pass the folder of a multimodal model.")
    if len(set(names.values())) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    known = family(text["model_type"])
    values = {**text, "architectures": [known.policy.__name__], "tie_word_embeddings": "lm_head.weight" not in names}
    settings = known.config(**values)
    write_json(folder / "config.json", {**settings.to_dict(), "architectures": values["architectures"]})
    for file in source.iterdir():
        if file.is_file() and file.suffix in COPIED and file.name not in LEFT_OUT:
            shutil.copyfile(file, folder / file.name)
    check_weights(folder, settings)


def _language_tensors(file: Path) -> dict[str, Tensor]:
    """The language model's tensors in a safetensors file, by their own names."""
    tensors = {}
    with safe_open(file, "pt") as content:
        for name in content.keys():  # noqa: SIM118 (not a dictionary)
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            if prefix is not None:
                tensors[PREFIXES[prefix] + name.removeprefix(prefix)] = content.get_tensor(name)
    return tensors
