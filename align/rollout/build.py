"""The engine a recipe asks for."""

from __future__ import annotations

from pathlib import Path

from align.config.rollout import Rollout
from align.rollout.base import RolloutEngine


def build_engine(
    checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int, beside_ranks: bool = False
) -> RolloutEngine:
    """vLLM in this process, vLLM servers, or Hugging Face generate, as the recipe names it; never one in place of
    another.

    beside_ranks: this process is one of several. vLLM inside it would take the others for its own, so it gets a process
    of its own, which ends with this one.
    """
    if beside_ranks and rollout.engine == "vllm":
        rollout = rollout.model_copy(update={"engine": "remote", "start_servers": 1})
    if rollout.engine == "vllm":
        from align.rollout.vllm_engine import VllmEngine

        return VllmEngine(checkpoint, rollout, dtype=dtype, seed=seed)
    if rollout.engine == "remote":
        from align.rollout.remote import RemoteEngine

        return RemoteEngine(checkpoint, rollout, dtype=dtype, seed=seed)
    from align.rollout.hf_engine import HuggingFaceEngine
    from align.train.checkpoint import load_policy

    return HuggingFaceEngine(load_policy(checkpoint, dtype), rollout)
