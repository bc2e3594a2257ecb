"""Build the generation engine that a recipe selects."""

from __future__ import annotations

from pathlib import Path

from align.config.rollout import Rollout
from align.rollout.base import RolloutEngine


def build_engine(
    checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int, beside_ranks: bool = False
) -> RolloutEngine:
    """Build vLLM in this process, a client of vLLM servers, or transformers' own decoding; there is no fallback.

    beside_ranks: this process is one of several ranks. vLLM in this process would join their process group, so it is
    started as a server instead, which ends with this process.
    """
    if beside_ranks and rollout.engine == "vllm":
        rollout = rollout.model_copy(update={"engine": "remote", "start_servers": 1})
    if rollout.engine == "vllm":
        from align.rollout.vllm_engine import VllmEngine  # vLLM is optional and slow to import

        return VllmEngine(checkpoint, rollout, dtype=dtype, seed=seed)
    if rollout.engine == "remote":
        from align.rollout.remote import RemoteEngine

        return RemoteEngine(checkpoint, rollout, dtype=dtype, seed=seed)
    from align.rollout.hf_engine import HuggingFaceEngine
    from align.train.checkpoint import load_policy

    return HuggingFaceEngine(load_policy(checkpoint, dtype), rollout)
