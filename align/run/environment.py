"""The environment variables and first imports of a process that runs stages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from align.config.recipe import Recipe

DEVICES = Path("/dev")


def prepare_process(recipe: Recipe) -> None:
    """Set the environment variables that libraries read when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get("ALIGN_VERBOSE"):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of torch's and vLLM's C++ code
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in a log
    if not sees_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if recipe.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
    # vLLM takes its number of threads from this variable. If it is unset, vLLM limits torch to one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


def load_transformers() -> None:
    """Import two modules of transformers that import scikit-learn if it is installed, but without it; loads torch.

    They use it for assisted decoding and for GLUE's metrics, which align does not use. Its import takes over a second.
    """
    from transformers import utils

    available = utils.is_sklearn_available
    utils.is_sklearn_available = lambda: False
    try:
        import transformers.data.metrics
        import transformers.generation.candidate_generator  # noqa: F401
    finally:
        utils.is_sklearn_available = available


def sees_gpu() -> bool:
    """True if this process sees an NVIDIA GPU. A container may have only /dev/nvidia3; WSL has /dev/dxg."""
    return any(DEVICES.glob("nvidia[0-9]*")) or (DEVICES / "dxg").exists()
