"""The working folder in which each case runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from align.data import train_tokenizer
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM

from .here import ANSWERS, SIZES, Here


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A HunYuan checkpoint of two layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = train_tokenizer([row["messages"][0]["content"] for row in ANSWERS], 300)
    torch.manual_seed(0)
    HunYuanForCausalLM(HunYuanConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture
def here(checkpoint: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    model, tokenizer = checkpoint
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TRL_EXPERIMENTAL_SILENCE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    return Here(tmp_path, tokenizer, monkeypatch)
