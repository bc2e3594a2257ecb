"""The size of a checkpoint is counted without reading its weights."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path

import pytest

from align.config.presets import PRESETS
from align.config.recipe import Recipe
from align.models.family import family_of
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.weight_files import StoredTensor
from align.recipes import base
from align.run.context import StageContext
from align.train.checkpoint import count_parameters, count_stored_parameters, load_policy
from tests.unit.train.one_step import SIZES, checkpoint


def write_hollow(folder: Path) -> int:
    """Write a checkpoint of Hunyuan-Large as a sparse file without data; return the size of its weights in bytes."""
    config = HunYuanConfig(**PRESETS["hunyuan-large"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["HunYuanForCausalLM"]}))
    header, end = {}, 0
    for name, shape in family_of(config).published_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    return end


def test_the_base_stage_counts_a_checkpoint_larger_than_the_machine(tmp_path: Path) -> None:
    """Hunyuan-Large has 389 billion parameters, 52 billion of them active (arXiv 2411.02265)."""
    size = write_hollow(tmp_path / "large")
    assert size > 770e9
    recipe = Recipe.model_validate(
        {
            "name": "large",
            "model": {"kind": "pretrained", "path": str(tmp_path / "large")},
            "stages": {"sft": {"kind": "sft", "data": {"train": [{"kind": "file", "path": "rows.jsonl"}]}}},
        }
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = base.run(StageContext(recipe, "base", tmp_path / "run", say=lambda line: None)).parameters
    assert parameters is not None
    assert parameters["total"] == pytest.approx(389e9, rel=2e-3)
    assert parameters["active"] == pytest.approx(52e9, rel=2e-2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB


@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_that_of_the_loaded_model(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model")
    if tied:
        config = HunYuanConfig(vocab_size=300, tie_word_embeddings=True, **SIZES)
        HunYuanForCausalLM(config).save_pretrained(folder)
    expected = count_parameters(load_policy(folder, "float32"))

    def read(*_: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(StoredTensor, "read_into", read)
    assert count_stored_parameters(folder) == expected
