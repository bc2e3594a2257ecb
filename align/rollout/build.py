"""Build the generation engine that a recipe selects."""

from __future__ import annotations

from pathlib import Path

from align.config.rollout import Rollout
from align.rollout.base import RolloutEngine


def require_placement(rollout: Rollout, *, beside_ranks: bool) -> None:
    """Raise `UserError` if the engine's servers cannot be placed on this machine's GPUs. Loads nothing."""
    rollout = _beside(rollout, beside_ranks)
    if rollout.start_servers:
        from align.rollout.placement import place_servers, visible_gpus

        place_servers(rollout, visible_gpus())


def build_engine(
    checkpoint: Path,
    rollout: Rollout,
    *,
    dtype: str,
    seed: int,
    beside_ranks: bool = False,
    detokenizes: bool = False,
) -> RolloutEngine:
    """Build vLLM in this process, a client of vLLM servers, or an engine on the transformers model.

    Raises an error if the engine that the recipe selects cannot be built; there is no fallback.

    beside_ranks: True if this process is one of several ranks. vLLM in this process would join their process group, so
        a vLLM server is started instead, which ends with this process.
    detokenizes: let vLLM in this process stop at stop strings, which tasks of an evaluation need.
    """
    rollout = _beside(rollout, beside_ranks)
    if rollout.engine == "vllm":
        from align.rollout.vllm_engine import VllmEngine  # vLLM is optional and slow to import

        return VllmEngine(checkpoint, rollout, dtype=dtype, seed=seed, detokenizes=detokenizes)
    if rollout.engine == "remote":
        from align.rollout.remote import RemoteEngine

        return RemoteEngine(checkpoint, rollout, dtype=dtype, seed=seed)
    from align.rollout.hf_engine import HuggingFaceEngine
    from align.train.checkpoint import load_policy

    return HuggingFaceEngine(load_policy(checkpoint, dtype), rollout)


def _beside(rollout: Rollout, beside_ranks: bool) -> Rollout:
    """The settings, with `engine: vllm` replaced by one started server if there are several ranks."""
    if beside_ranks and rollout.engine == "vllm":
        return rollout.model_copy(update={"engine": "remote", "start_servers": 1})
    return rollout
