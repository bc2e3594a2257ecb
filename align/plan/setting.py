"""The parallel setting of a stage, which the planner varies, and the cluster, which is fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.config.parallel import Parallel
from align.plan.job import Job

OffloadTarget = Literal["cpu", "nvme"]
GB = 10**9


@dataclass(frozen=True)
class Setting:
    """Parallelism, offloading and batching of one stage.

    gpus: ranks, one per GPU.
    deepspeed: False for a single process without DeepSpeed.
    zero_stage, expert_parallel_size, offload_optimizer, offload_parameters, gradient_checkpointing: as in a recipe.
    micro_batch: examples per forward pass of one rank.
    rollout_gpus: tensor-parallel size of a rollout engine. Without servers, the ranks run gpus / rollout_gpus engines.
    rollout_sleep: the engines release their GPU memory between rollouts.
    """

    gpus: int
    deepspeed: bool
    zero_stage: int = 3
    expert_parallel_size: int = 1
    offload_optimizer: OffloadTarget | None = None
    offload_parameters: OffloadTarget | None = None
    gradient_checkpointing: bool = False
    micro_batch: int = 1
    rollout_gpus: int = 1
    rollout_sleep: bool = False

    @property
    def expert_replicas(self) -> int:
        """Data-parallel replicas of each expert."""
        return self.gpus // self.expert_parallel_size

    def accumulation(self, job: Job) -> int:
        """Micro-batches of a rank per optimizer step."""
        return max(1, -(-job.batch // (self.micro_batch * self.gpus)))

    def idle(self, job: Job) -> int:
        """Ranks without a micro-batch in an optimizer step; PPO assigns whole micro-batches to ranks."""
        return max(0, self.gpus - -(-job.batch // self.micro_batch))


@dataclass(frozen=True)
class Cluster:
    """Size and memory of the machines, in bytes.

    gpus, hosts: in total.
    gpu_memory: per GPU.
    host_memory: per host; None means no limit.
    nvme: disk per host; None means no offloading to disk.
    reserve: GPU memory kept free for the CUDA context, NCCL's buffers and allocator fragmentation.
    """

    gpus: int
    hosts: int
    gpu_memory: float
    host_memory: float | None = None
    nvme: float | None = None
    reserve: float = 4 * GB

    @property
    def gpus_per_host(self) -> int:
        return -(-self.gpus // self.hosts)


def rows_per_pass(job: Job, gpus: int) -> int:
    """Examples per forward pass of one of `gpus` ranks under the recipe's batch sizes."""
    if job.rollouts is not None:
        return job.micro_batch
    return min(job.micro_batch, max(1, job.batch // gpus))


def counted(number: int, thing: str) -> str:
    """`number` followed by the noun `thing`, in the plural unless `number` is 1."""
    return f"{number} {thing}{'' if number == 1 else 'es' if thing.endswith(('s', 'ch')) else 's'}"


def setting_of(job: Job, parallel: Parallel | None, gpus: int) -> Setting:
    """The recipe's setting on `gpus` GPUs. Without a `parallel` section: ZeRO-3, or no DeepSpeed on one GPU."""
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
        micro_batch=rows_per_pass(job, gpus),
        rollout_gpus=job.rollouts.gpus_per_server if job.rollouts else 1,
        rollout_sleep=job.rollouts.sleeps if job.rollouts else False,
    )


def unusable(job: Job, setting: Setting) -> str | None:
    """Reason why a setting cannot run with any amount of memory; None if it can run."""
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
    # PPO's ranks may have unequal numbers of rows.
    if job.rollouts is None and job.batch % gpus:
        return f"batch {job.batch} is not divisible by {counted(gpus, 'GPU')}"
    return None
