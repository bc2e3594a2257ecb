"""Inspect the machine and the model's files for `align init`, without loading torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from align.config.paths import local_path
from align.launch.nvidia import read_machine
from align.run.folder import MODEL

BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}
FULL_BYTES = 16
"""Bytes per parameter of full training: float32 weight and gradient, and AdamW's two moments."""
FROZEN_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes per frozen parameter under LoRA, by `dtype` of the recipe."""


@dataclass(frozen=True)
class Machine:
    """The machine that will train.

    memory_gb: memory in GB (1e9 bytes) of each GPU, or of the host without GPUs.
    bfloat16: True if the GPUs compute bfloat16 fast.
    """

    cores: int
    gpus: int
    memory_gb: float
    name: str
    bfloat16: bool

    def summary(self) -> str:
        if self.gpus:
            return f"{self.gpus} x {self.name}, {self.memory_gb:.0f} GB each"
        return f"{self.cores} CPU cores, {self.memory_gb:.0f} GB of memory, no GPU"


def read_this_machine() -> Machine:
    found = read_machine().gpus
    if found and found[0].memory_mib:
        fast = all((gpu.capability or (0, 0)) >= (8, 0) for gpu in found)
        memory = min(gpu.memory_mib or 0 for gpu in found) * 2**20 / 1e9
        return Machine(len(os.sched_getaffinity(0)), len(found), memory, found[0].name, fast)
    return without_gpus()


def without_gpus() -> Machine:
    """This machine with its GPUs ignored."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Machine(len(os.sched_getaffinity(0)), 0, memory, "CPU", False)


@dataclass(frozen=True)
class ModelLook:
    """Facts from a checkpoint's files; None if the checkpoint is not on this machine.

    parameters: number of parameters, from the size of the weight files.
    context: `max_position_embeddings`.
    template: True if the tokenizer has a chat template.
    """

    parameters: float | None = None
    context: int | None = None
    template: bool | None = None


def look_at_model(path: str) -> ModelLook:
    """Inspect a checkpoint folder. An invalid folder is refused later, when the recipe is checked."""
    folder = local_path(path)
    folder = folder / MODEL if (folder / MODEL / "config.json").is_file() else folder
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        size = BYTES_PER_VALUE.get(str(config.get("dtype") or config.get("torch_dtype")), 4)
        context = config.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return ModelLook()
    return ModelLook(weights / size or None, context if isinstance(context, int) else None, _has_template(folder))


def _has_template(folder: Path) -> bool:
    if any(folder.glob("chat_template*")):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
