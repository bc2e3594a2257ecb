"""What a plan may choose (how a stage is spread) and what it is given (the machines)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.config.parallel import Parallel
from align.plan.job import Job

Place = Literal["cpu", "nvme"]
GB = 10**9


@dataclass(frozen=True)
class Setting:
    """How one stage is spread over `gpus` ranks. deepspeed: False is one process without it.

    micro_batch: examples in a forward pass of one rank. rollout_gpus: GPUs over which one vLLM engine splits the
    policy; in the training processes there are gpus / rollout_gpus of them. rollout_sleep: they give their memory back
    between rounds.
    """

    gpus: int
    deepspeed: bool
    zero_stage: int = 3
    expert_parallel_size: int = 1
    offload_optimizer: Place | None = None
    offload_parameters: Place | None = None
    gradient_checkpointing: bool = False
    micro_batch: int = 1
    rollout_gpus: int = 1
    rollout_sleep: bool = False

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // self.expert_parallel_size

    def accumulation(self, job: Job) -> int:
        """Forward passes of a rank in an optimizer step."""
        return max(1, -(-job.batch // (self.micro_batch * self.gpus)))

    def idle(self, job: Job) -> int:
        """Ranks that have no pass of their own in an optimizer step: PPO deals out a mini-batch's passes whole."""
        return max(0, self.gpus - -(-job.batch // self.micro_batch))


@dataclass(frozen=True)
class Cluster:
    """The machines; bytes of a GPU, a host and a host's disk. reserve: bytes of a GPU that no tensor may take: the
    CUDA context, NCCL's buffers and the allocator's fragmentation.

    host_memory None: not said, so not a limit. nvme None: there is no disk to offload to.
    """

    gpus: int
    hosts: int
    gpu_memory: float
    host_memory: float | None = None
    nvme: float | None = None
    reserve: float = 4 * GB

    @property
    def gpus_a_host(self) -> int:
        return -(-self.gpus // self.hosts)


def rows_a_pass(job: Job, gpus: int) -> int:
    """Examples in a forward pass as the recipe has it, on `gpus` ranks."""
    if job.kind == "ppo":
        return job.micro_batch
    return min(job.micro_batch, max(1, job.batch // gpus))


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 'es' if thing.endswith('s') else 's'}"


def setting_of(job: Job, parallel: Parallel | None, gpus: int) -> Setting:
    """What the recipe says, on `gpus` GPUs; ZeRO-3 on several of them where it has no `parallel` section."""
    if parallel is None:
        parallel = Parallel(processes=gpus)
        deepspeed = gpus > 1
    else:
        deepspeed = True
    return Setting(
        gpus=gpus,
        deepspeed=deepspeed,
        zero_stage=parallel.zero_stage if deepspeed else 0,
        expert_parallel_size=parallel.expert_parallel_size,
        offload_optimizer=parallel.offload.optimizer,
        offload_parameters=parallel.offload.parameters,
        gradient_checkpointing=job.gradient_checkpointing,
        micro_batch=rows_a_pass(job, gpus),
        rollout_gpus=job.rollouts.gpus_a_server if job.rollouts else 1,
        rollout_sleep=job.rollouts.sleeps if job.rollouts else False,
    )


def unusable(job: Job, setting: Setting) -> str | None:
    """Why a setting cannot run, whatever the memory; None where it can."""
    ep, gpus = setting.expert_parallel_size, setting.gpus
    if setting.deepspeed and setting.zero_stage == 0 and ep > 1:
        return "expert_parallel_size needs zero_stage 1, 2 or 3"
    if gpus % ep:
        return f"expert_parallel_size {ep} does not divide {counted(gpus, 'GPU')}"
    for member in job.members:
        for layer in member.shape.layers:
            if layer.experts and layer.num_experts % ep:
                return (
                    f"expert_parallel_size {ep} does not divide the {layer.num_experts} experts of {member.shape.name}"
                )
            if not layer.experts and ep > 1 and not member.shape.experts:
                return f"expert_parallel_size {ep}: {member.shape.name} has no experts"
    if job.kind != "ppo" and job.batch % (setting.micro_batch * gpus):  # PPO's ranks may have unequal shares
        return (
            f"{counted(gpus, 'GPU')} with {counted(setting.micro_batch, 'pair' if job.sequences > 1 else 'row')} a "
            f"pass cannot share the batch of {job.batch} evenly"
        )
    return None
