"""Start the model under evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from align.config.parallel import Parallel
from align.config.rollout import Rollout
from align.errors import UserError
from align.eval.model import EvalModel

Backend = Literal["vllm", "hf"]
DEFAULT_MAX_LENGTH = 4096
UNREAD = 2
"""Positions that vLLM needs beyond `max_length`: the last token of a target, and one that is generated."""


@dataclass(frozen=True)
class Engine:
    """Settings of the engine.

    backend: vllm, or hf for transformers.
    dtype: float32 or bfloat16.
    max_length: maximum tokens of prompt and completion.
    batch_size: sequences at a time.
    cache_gib: size of vLLM's key/value cache; None is vLLM's default on a GPU, and 0.5 on a CPU.
    parallel: shard the model over the ranks of a run, with the backend hf.
    """

    backend: Backend
    dtype: str
    max_length: int
    batch_size: int = 64
    cache_gib: float | None = None
    parallel: Parallel | None = None


def default_dtype() -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def length_limit(folder: Path, wanted: int | None) -> int:
    """`max_length` of a checkpoint: `wanted`, or at most DEFAULT_MAX_LENGTH.

    Both backends can use two positions less than the model has, so that they have the same windows.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings")
    longest = None if positions is None else int(positions) - UNREAD
    if wanted is None:
        return DEFAULT_MAX_LENGTH if longest is None else min(longest, DEFAULT_MAX_LENGTH)
    if longest is not None and wanted > longest:
        raise UserError(
            f"--max-length {wanted}: {folder} has {positions} positions, two of which are kept free. Set at most "
            f"{longest}."
        )
    return wanted


def open_model(folder: Path, tokenizer: PreTrainedTokenizerBase, engine: Engine) -> EvalModel:
    """Load a checkpoint."""
    if engine.backend == "hf":
        from align.rollout.hf_requests import HuggingFaceModel
        from align.train.checkpoint import load_policy
        from align.train.device import training_device
        from align.train.frozen import FrozenModel

        model = load_policy(folder, engine.dtype, engine.parallel, frozen=True).eval().to(training_device())
        frozen = FrozenModel(model, engine.parallel, engine.dtype)
        sizes = {"max_length": engine.max_length, "batch_size": engine.batch_size}
        return HuggingFaceModel(model, tokenizer, **sizes, run=frozen.run)
    from align.rollout.vllm_engine import VllmEngine
    from align.rollout.vllm_requests import VllmModel

    rollout = Rollout(
        max_model_length=engine.max_length + UNREAD, max_sequences=engine.batch_size, cache_gib=engine.cache_gib
    )
    started = VllmEngine(folder, rollout, dtype=engine.dtype, seed=0, detokenizes=True)
    return VllmModel(started, tokenizer, folder)
