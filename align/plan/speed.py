"""Estimate the seconds of a step from the rates of a GPU and its links.

The lower bound assumes that everything overlaps, the upper bound that nothing does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from align.plan.job import Job
from align.plan.memory import engine_bytes
from align.plan.setting import Cluster, Setting
from align.plan.traffic import Link, traffic, work

TFLOPS_EFFICIENCY, LINK_EFFICIENCY = 0.4, 0.7
"""Assumed shares of the peak rates, for rates that were not measured."""


@dataclass(frozen=True)
class Rates:
    """Achieved (not peak) rates.

    tflops: 1e12 operations per second of one GPU in bf16.
    memory: GB/s of one GPU's memory.
    link: GB/s of one GPU to the GPUs of its host, in one direction.
    network: GB/s of one GPU to other hosts.
    host: GB/s of one GPU to its host's memory.
    nvme: GB/s of a host's NVMe disks.
    host_memory: GB/s of a host's memory.
    """

    tflops: float
    memory: float
    link: float
    network: float
    host: float
    nvme: float = 6.0
    host_memory: float = 200.0


@dataclass(frozen=True)
class Gpu:
    """Memory in GB and peak rates from a data sheet (bf16 without sparsity; `link` in one direction)."""

    memory_gb: float
    tflops: float
    memory: float
    link: float
    network: float
    host: float

    @property
    def rates(self) -> Rates:
        links = (LINK_EFFICIENCY * link for link in (self.memory, self.link, self.network, self.host))
        return Rates(TFLOPS_EFFICIENCY * self.tflops, *links)


GPUS: dict[str, Gpu] = {
    "a100-40": Gpu(40, 312, 1555, 300, 25, 32),
    "a100": Gpu(80, 312, 2039, 300, 25, 32),
    "a800": Gpu(80, 312, 2039, 200, 25, 32),
    "h20": Gpu(96, 148, 4000, 450, 50, 64),
    "h100": Gpu(80, 989, 3350, 450, 50, 64),
    "h800": Gpu(80, 989, 3350, 200, 50, 64),
    "h200": Gpu(141, 989, 4800, 450, 50, 64),
    "b200": Gpu(180, 2250, 8000, 900, 50, 64),
    "l40s": Gpu(48, 362, 864, 32, 25, 32),
}
"""From NVIDIA's data sheets. `network` is one 400 Gbit/s adapter per GPU (200 Gbit/s for A100, A800 and L40S); `host`
is PCIe 5 x16 (PCIe 4 for those)."""


@dataclass(frozen=True)
class Duration:
    """Time of an optimizer step or PPO iteration.

    fastest, slowest: bounds in seconds.
    parts: seconds of each part alone.
    tokens: trained tokens, with sequences of full length; PPO counts every epoch.
    """

    fastest: float
    slowest: float
    parts: dict[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        """Midpoint of the bounds; settings are ordered by it."""
        return (self.fastest + self.slowest) / 2


def duration(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Duration:
    """Estimate the time of an optimizer step, or of a PPO iteration, on `cluster`."""
    parts = {"compute": operations(job, setting) / (rates.tflops * 1e12)}
    received: dict[Link, float] = {"collective": 0, "all-to-all": 0, "host": 0, "nvme": 0}
    for flow, size in traffic(job, setting).items():
        received[flow.link] += size
    parts["collectives"] = _collective(received["collective"], cluster, rates)
    parts["expert all-to-all"] = _all_to_all(received["all-to-all"], setting, cluster, rates)
    parts["host link"] = received["host"] / (rates.host * 1e9)
    parts["NVMe"] = received["nvme"] * cluster.gpus_per_host / (rates.nvme * 1e9)
    overlapped = list(parts.values())
    if setting.offload_optimizer:
        parts["AdamW on the CPU"] = _cpu_adam(job, setting, cluster, rates)
    if job.rollouts is not None:
        parts["generation"] = _generation(job, setting, cluster, rates)
    alone = sum(parts.values()) - sum(overlapped)
    tokens = job.batch * job.updates * job.sequences * job.length
    shown = {name: seconds for name, seconds in parts.items() if seconds > 0}
    return Duration(max(overlapped) + alone, sum(overlapped) + alone, shown, tokens)


def operations(job: Job, setting: Setting) -> float:
    """Multiplications and additions of one rank in a step.

    A backward pass costs as much as two forward passes, or as one if the matrices are frozen and need no gradient.
    Activation checkpointing adds one forward pass.
    """
    tokens = setting.micro_batch * job.sequences * job.length
    total = 0.0
    for piece in work(job, setting):
        forward = tokens * piece.member.shape.forward_flops(job.length, scorer=piece.member.scorer)
        passes = 1
        if piece.trained:
            passes = (3 if piece.member.trained == "all" else 2) + setting.gradient_checkpointing
        total += piece.count * passes * forward
    return total


def _collective(received: float, cluster: Cluster, rates: Rates) -> float:
    """Seconds of the collectives. A ring enters each host once, so its network adapters share the bytes received."""
    inside = received / (rates.link * 1e9)
    if cluster.hosts == 1:
        return inside
    return max(inside, received / cluster.gpus_per_host / (rates.network * 1e9))


def _all_to_all(received: float, setting: Setting, cluster: Cluster, rates: Rates) -> float:
    """Seconds of the expert all-to-all. Groups are consecutive ranks, so they stay within a large enough host."""
    ep, here = setting.expert_parallel_size, cluster.gpus_per_host
    outside = max(0.0, (ep - here) / (ep - 1)) if ep > 1 else 0.0
    return received * ((1 - outside) / rates.link + outside / rates.network) / 1e9


def _cpu_adam(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> float:
    """Seconds of AdamW in host memory.

    Memory bandwidth is the limit. Per parameter, AdamW reads the fp32 weight, the gradient and two moments (16 bytes),
    and writes the fp32 weight, the moments (12 bytes) and the bf16 weight (2 bytes).
    """
    trained = sum(sum(member.trained_counts) for member in job.learners)
    per_host = trained / setting.gpus * cluster.gpus_per_host
    return job.updates * per_host * (16 + 12 + 2) / (rates.host_memory * 1e9)


def engine_sizes(job: Job, gpus: int) -> list[int]:
    """Tensor-parallel sizes of an engine on `gpus` GPUs; vLLM shards attention heads, so a size must divide them."""
    heads = job.members[0].shape.heads
    return [size for size in (1, 2, 4, 8, 16, 32, 64) if gpus % size == 0 and heads % size == 0]


def server_gpus(job: Job, cluster: Cluster) -> int | None:
    """Number of GPUs of the cluster's kind that a rollout server needs; None if 64 are too few."""
    for size in engine_sizes(job, 64):
        if sum(engine_bytes(job, size).values()) + cluster.reserve <= cluster.gpu_memory:
            return size
    return None


def _generation(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> float:
    """Seconds of generation.

    An engine decodes its sequences in waves of at most `max_sequences`. Each decoding step reads the weights that the
    wave's tokens activate.
    """
    assert job.rollouts is not None
    policy, rollouts = job.members[0], job.rollouts
    gpus = setting.rollout_gpus
    if rollouts.servers:
        gpus = max(gpus, server_gpus(job, cluster) or 1)
    engines = rollouts.servers or max(1, setting.gpus // gpus)
    sequences = math.ceil(rollouts.completions / engines)
    wave = min(sequences, rollouts.max_sequences)
    activated = 1.0
    if policy.shape.experts:
        layer = policy.shape.largest_layer
        activated = 1 - (1 - layer.top_k / layer.num_experts) ** wave
    values = policy.parameters - policy.shape.experts * (1 - activated)
    width = 4 if job.dtype == "float32" else 2
    read = values * width / gpus / (rates.memory * 1e9)
    forward = policy.shape.forward_flops(job.length) / gpus / (rates.tflops * 1e12)
    prompts = sequences * (job.length - rollouts.max_new_tokens) * forward
    return math.ceil(sequences / wave) * rollouts.max_new_tokens * max(read, wave * forward) + prompts
