"""The device that a line of `align smoke` runs on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from align.plan.speed import GPUS, Gpu


@dataclass(frozen=True)
class Machine:
    """The device of this process.

    device: cuda or cpu.
    name: name of the GPU; None on a CPU.
    gpus: number of visible GPUs.
    """

    device: str
    name: str | None
    gpus: int

    @property
    def has_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def peak(self) -> Gpu | None:
        """Peak rates from the data sheet; None on a CPU, or if the planner's table lacks this GPU."""
        words = (self.name or "").lower().replace("-", " ").split()
        return next((gpu for name, gpu in GPUS.items() if name in words), None)

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s in bf16; None if unknown."""
        return None if self.peak is None else self.peak.tflops * 1e12

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_machine() -> Machine:
    if not torch.cuda.is_available():
        return Machine("cpu", None, 0)
    return Machine("cuda", torch.cuda.get_device_name(0), torch.cuda.device_count())


def synchronize(machine: Machine) -> None:
    """Wait for the GPU, if there is one."""
    if machine.has_gpu:
        torch.cuda.synchronize()
