"""How a recipe is spread over processes: ZeRO stage, expert parallelism, offload, machines."""

from __future__ import annotations

from math import gcd
from typing import Literal

from pydantic import Field, model_validator

from align.config.parts import Positive, Section


class Offload(Section):
    """What leaves the accelerator's memory while it is not needed."""

    optimizer: Literal["cpu", "nvme"] | None = None
    """Where AdamW's moments and the float32 weights live, and where the update is computed (on the CPU, for both)."""
    parameters: Literal["cpu", "nvme"] | None = None
    """Where a rank's slices of the weights live; needs `zero_stage` 3."""
    path: str | None = None
    """Folder on a fast local disk, for this run alone, where something is offloaded to `nvme`; relative to the working
    directory."""

    @model_validator(mode="after")
    def _nvme_has_a_path(self) -> Offload:
        to_disk = "nvme" in (self.optimizer, self.parameters)
        if to_disk and self.path is None:
            raise ValueError("nvme needs a folder on a local disk; add path, or write cpu")
        if self.path is not None and not to_disk:
            raise ValueError("path is given, but nothing is offloaded to nvme; remove it, or write nvme")
        return self


class Parallel(Section):
    """Several processes under DeepSpeed. Without this section a run is one process and DeepSpeed is not loaded."""

    processes: Positive = 1
    """Processes (ranks) over all machines, one for each accelerator; `align run --nproc` goes before it."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """What is sharded over the ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights."""
    expert_parallel_size: Positive = 1
    """Ranks over which a layer's routed experts are spread; tokens travel to them and experts never do. Divides
    `processes` and the number of experts."""
    offload: Offload = Field(default_factory=Offload)
    """What leaves the accelerator's memory."""
    hostfile: str | None = None
    """File with a line `host slots=N` for each machine. `align run` is then started on every one of them."""

    def expert_group_problem(self, experts: int, owner: str) -> str | None:
        """What is wrong where the ranks of a group cannot have equally many of the `experts` that `owner` has in a
        layer; one expert means a dense layer."""
        if experts <= 1 or experts % self.expert_parallel_size == 0:
            return None
        # Where the processes are at fault as well, as without --nproc, their number is not what to go by.
        shared = gcd(experts, self.processes) if self.process_group_problem() is None else experts
        *fewer, most = (str(size) for size in range(1, shared + 1) if shared % size == 0)
        sizes = f"{', '.join(fewer)} or {most}" if fewer else most
        return (
            f"parallel.expert_parallel_size {self.expert_parallel_size} does not divide the {experts} experts of "
            f"{owner}; set it to {sizes}."
        )

    def process_group_problem(self) -> str | None:
        """What is wrong where the processes cannot be divided into groups of `expert_parallel_size`; asked apart from
        the recipe's validation, because `align plan` is about other processes than the recipe's."""
        if self.processes % self.expert_parallel_size == 0:
            return None
        return (
            f"parallel.expert_parallel_size {self.expert_parallel_size} does not divide the number of processes, "
            f"{self.processes} (parallel.processes, --nproc); change one of them."
        )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Parallel:
        if self.expert_parallel_size > 1 and self.zero_stage == 0:
            raise ValueError(
                "expert_parallel_size needs zero_stage 1, 2 or 3: without ZeRO, DeepSpeed clips each rank by a "
                "gradient norm that leaves the others' experts out; change zero_stage"
            )
        if self.offload.parameters is not None and self.zero_stage != 3:
            raise ValueError(
                f"offload.parameters needs zero_stage 3, and zero_stage is {self.zero_stage}; change one of them"
            )
        if self.offload.optimizer is not None and self.zero_stage == 0:
            raise ValueError("offload.optimizer needs zero_stage 1 or more, and zero_stage is 0; change one of them")
        if self.offload.optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(
                f"offload.optimizer to nvme needs zero_stage 3, and zero_stage is {self.zero_stage}; "
                "write cpu, or change zero_stage"
            )
        return self
