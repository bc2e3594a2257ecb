"""Several processes: ZeRO stage, expert parallelism, offload, machines."""

from __future__ import annotations

from math import gcd
from typing import Literal

from pydantic import Field, model_validator

from align.config.section import Positive, Section


class Offload(Section):
    """Training state kept outside GPU memory (DeepSpeed ZeRO-Offload)."""

    optimizer: Literal["cpu", "nvme"] | None = None
    """Storage of AdamW's moments and the float32 weights. Offloaded state is updated on the CPU. Default: GPU
    memory."""
    parameters: Literal["cpu", "nvme"] | None = None
    """Storage of the sharded weights. Needs `zero_stage: 3`. Default: GPU memory."""
    path: str | None = None
    """Folder on a fast local disk for `nvme`, used by this run only. Relative to the working directory."""

    @model_validator(mode="after")
    def _nvme_has_a_path(self) -> Offload:
        to_disk = "nvme" in (self.optimizer, self.parameters)
        if to_disk and self.path is None:
            raise ValueError("nvme needs a folder on a local disk; set path, or write cpu instead of nvme")
        if self.path is not None and not to_disk:
            raise ValueError(
                "path is set, but nothing is offloaded to nvme; remove path, or set optimizer or parameters to nvme"
            )
        return self


class Parallel(Section):
    """Training on several processes with DeepSpeed. Without this section a run is one process without DeepSpeed."""

    processes: Positive = 1
    """Number of processes (ranks) over all machines, one per accelerator. `align run --nproc` overrides it."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """State sharded over the ranks. 0: none; 1: optimizer states; 2: also gradients; 3: also weights."""
    expert_parallel_size: Positive = 1
    """Number of ranks over which the routed experts of a layer are sharded; tokens are dispatched by all-to-all. Must
    divide `processes` and the number of experts."""
    offload: Offload = Field(default_factory=Offload)
    """Training state kept outside GPU memory. Default: none."""
    hostfile: str | None = None
    """File with one line `host slots=N` per machine. Start `align run` on every machine."""

    def expert_group_problem(self, experts: int, owner: str) -> str | None:
        """Error message if the ranks of an expert-parallel group cannot shard a layer's experts evenly, else None.

        experts  routed experts of the layer; 1 for a dense layer
        owner    the model, as the message names it
        """
        if experts <= 1 or experts % self.expert_parallel_size == 0:
            return None
        # If the number of processes is wrong too (a forgotten --nproc), it must not limit the suggested sizes.
        shared = gcd(experts, self.processes) if self.process_group_problem() is None else experts
        *fewer, most = (str(size) for size in range(1, shared + 1) if shared % size == 0)
        sizes = f"{', '.join(fewer)} or {most}" if fewer else most
        return (
            f"parallel.expert_parallel_size {self.expert_parallel_size} does not divide the {experts} experts of "
            f"{owner}; set it to {sizes}."
        )

    def process_group_problem(self) -> str | None:
        """Error message if the processes cannot be divided into groups of `expert_parallel_size`, else None.

        Not a validator, because `align plan` considers other numbers of processes than the recipe's.
        """
        if self.processes % self.expert_parallel_size == 0:
            return None
        return (
            f"parallel.expert_parallel_size {self.expert_parallel_size} does not divide the number of processes, "
            f"{self.processes} (parallel.processes, --nproc); set it to a divisor, or change the number of processes."
        )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Parallel:
        if self.expert_parallel_size > 1 and self.zero_stage == 0:
            raise ValueError(
                "expert_parallel_size needs zero_stage 1, 2 or 3: at zero_stage 0 DeepSpeed clips a rank's gradients "
                "by a norm that omits the other ranks' experts; set zero_stage to 1, 2 or 3"
            )
        if self.offload.parameters is not None and self.zero_stage != 3:
            raise ValueError(
                f"offload.parameters needs zero_stage 3, but zero_stage is {self.zero_stage}; set zero_stage to 3, or "
                "remove offload.parameters"
            )
        if self.offload.optimizer is not None and self.zero_stage == 0:
            raise ValueError(
                "offload.optimizer needs zero_stage 1, 2 or 3, but zero_stage is 0; change zero_stage, or remove "
                "offload.optimizer"
            )
        if self.offload.optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(
                f"offload.optimizer to nvme needs zero_stage 3, but zero_stage is {self.zero_stage}; write cpu instead "
                "of nvme, or set zero_stage to 3"
            )
        return self
