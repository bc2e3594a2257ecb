"""The engine a recipe asks for."""

from __future__ import annotations

from pathlib import Path

from align.config.rollout import Rollout
from align.rollout.base import RolloutEngine


def build_engine(checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int) -> RolloutEngine:
    """vLLM in this process, vLLM servers, or Hugging Face generate, as the recipe names it; never one in place of
    another."""
    if rollout.engine == "vllm":
        from align.rollout.vllm_engine import VllmEngine

        return VllmEngine(checkpoint, rollout, dtype=dtype, seed=seed)
    if rollout.engine == "remote":
        from align.rollout.remote import RemoteEngine

        return RemoteEngine(checkpoint, rollout, dtype=dtype, seed=seed)
    from align.rollout.hf_engine import HuggingFaceEngine
    from align.train.checkpoint import load_policy

    return HuggingFaceEngine(load_policy(checkpoint, dtype), rollout)
