"""The environment variables of a process that runs stages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from align.config.recipe import Recipe

DEVICES = Path("/dev")


def prepare_process(recipe: Recipe) -> None:
    """Set the environment variables that libraries read when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in a log
    if not sees_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if recipe.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
    # vLLM derives its threads from this variable, and without it reduces torch to one.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


def sees_gpu() -> bool:
    """True if the driver shows this process an NVIDIA GPU: a container may have nvidia3 alone, WSL has dxg."""
    return any(DEVICES.glob("nvidia[0-9]*")) or (DEVICES / "dxg").exists()
