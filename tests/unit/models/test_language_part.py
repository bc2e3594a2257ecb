"""The language model of a multimodal checkpoint computes the same logits for text as the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from align import cli
from align.data.tokenizer import train_tokenizer
from align.train.checkpoint import load_policy, load_tokenizer
from tests.tiny_families import FAMILIES, SHARED, randomise

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [8, 4, 4]}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text", "tie_word_embeddings": True},
    "mistral3": {"model_type": "mistral", "sliding_window": None},
    "llama4": {"model_type": "llama4_text"},
    "llava": {"model_type": "llama"},
    "qwen2_5_vl": {"model_type": "qwen2", "rope_parameters": MROPE},
    "qwen3_vl": {"model_type": "qwen3", "rope_parameters": MROPE | {"mrope_interleaved": True}},
}


def save(kind: str, folder: Path, shard: str = "1GB") -> Any:
    text = {
        **SHARED,
        **FAMILIES[KINDS[kind]["model_type"]],
        **KINDS[kind],
        "vocab_size": 272,
    }  # Qwen2 adds tokens to a tokenizer
    text = {name: value for name, value in text.items() if value is not None}
    vision = VISION | {"image_size": 28, "patch_size": 14} | ({"head_dim": 8} if kind == "mistral3" else {})
    if "vl" in kind:
        text["model_type"] = f"{kind}_text"
        vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"deepstack_visual_indexes": [0]} if kind == "qwen3_vl" else {"fullatt_block_indexes": [0]}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, tie_word_embeddings=kind == "gemma3")
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model, 1)
    model.save_pretrained(folder, max_shard_size=shard)
    train_tokenizer(["a"], 259).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return model


@pytest.mark.parametrize(("kind", "shard"), [(kind, "100KB" if kind == "mistral3" else "1GB") for kind in KINDS])
def test_logits_of_text_are_those_of_the_whole_model(tmp_path, kind, shard, capsys):
    whole = save(kind, tmp_path / "whole", shard)
    cli.main(["convert", "language-model", str(tmp_path / "whole"), str(tmp_path / "text")])
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "text"))
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == KINDS[kind]["model_type"]
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()
    text = load_policy(tmp_path / "text", "float32").eval()
    assert load_tokenizer(tmp_path / "text").decode([65 + 3]) != ""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
