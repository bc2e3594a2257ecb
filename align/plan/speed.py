"""Seconds of a step, from the rates of a GPU and its wires. An estimate: a lower bound with everything overlapped, an
upper one with nothing overlapped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from align.plan.job import Job
from align.plan.memory import engine_bytes
from align.plan.setting import Cluster, Setting
from align.plan.traffic import Wire, traffic, work

TFLOPS_EFFICIENCY, WIRE_EFFICIENCY = 0.4, 0.7
"""Shares of the peak rates that a run is taken to reach, where no measured rate is given."""


@dataclass(frozen=True)
class Rates:
    """Reached (not peak) rates of one GPU.

    tflops: 1e12 operations a second in bf16. memory: of its own memory; link: to GPUs of its host, one direction;
    network: to those of other hosts; host: to its host's memory; all in GB/s. nvme and host_memory: GB/s of a whole
    host.
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
    """Peak rates of a data sheet (bf16 without sparsity; link: one direction) and its memory in GB."""

    memory_gb: float
    tflops: float
    memory: float
    link: float
    network: float
    host: float

    @property
    def rates(self) -> Rates:
        wires = (WIRE_EFFICIENCY * wire for wire in (self.memory, self.link, self.network, self.host))
        return Rates(TFLOPS_EFFICIENCY * self.tflops, *wires)


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
"""NVIDIA's data sheets; network: an adapter of 400 Gbit/s for each GPU (200 with A100 and L40S); host: PCIe 5 x16 (4
with those)."""


@dataclass(frozen=True)
class Duration:
    """Seconds of a step. parts: what each thing takes by itself."""

    fastest: float
    slowest: float
    parts: dict[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        """Half-way between the bounds; settings are ordered by it."""
        return (self.fastest + self.slowest) / 2


def duration(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Duration:
    """What a step takes on `cluster`."""
    parts = {"arithmetic": operations(job, setting) / (rates.tflops * 1e12)}
    wires: dict[Wire, float] = {"collective": 0, "exchange": 0, "host": 0, "nvme": 0}
    for flow, size in traffic(job, setting).items():
        wires[flow.wire] += size
    parts["collectives"] = _collective(wires["collective"], cluster, rates)
    parts["tokens to experts"] = _exchange(wires["exchange"], setting, cluster, rates)
    parts["host link"] = wires["host"] / (rates.host * 1e9)
    parts["NVMe"] = wires["nvme"] * cluster.gpus_a_host / (rates.nvme * 1e9)
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

    A backward pass costs two forward passes, one where the matrices are frozen and need no gradient; recomputing
    activations costs a third or second.
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
    """A ring passes through each host once, so a GPU's adapter carries its share of what the host receives."""
    inside = received / (rates.link * 1e9)
    if cluster.hosts == 1:
        return inside
    return max(inside, received / cluster.gpus_a_host / (rates.network * 1e9))


def _exchange(received: float, setting: Setting, cluster: Cluster, rates: Rates) -> float:
    """Groups of consecutive ranks lie in one host as far as it has GPUs."""
    ep, here = setting.expert_parallel_size, cluster.gpus_a_host
    outside = max(0.0, (ep - here) / (ep - 1)) if ep > 1 else 0.0
    return received * ((1 - outside) / rates.link + outside / rates.network) / 1e9


def _cpu_adam(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> float:
    """Bound by memory: weight, gradient and two moments in fp32 are read, all but the gradient written, and bf16."""
    trained = sum(sum(member.trained_counts) for member in job.learners)
    a_host = trained / setting.gpus * cluster.gpus_a_host
    return job.updates * a_host * (16 + 12 + 2) / (rates.host_memory * 1e9)


def engine_sizes(job: Job, gpus: int) -> list[int]:
    """vLLM splits heads, so an engine's GPUs divide them."""
    heads = job.members[0].shape.heads
    return [size for size in (1, 2, 4, 8, 16, 32, 64) if gpus % size == 0 and heads % size == 0]


def server_gpus(job: Job, cluster: Cluster) -> int | None:
    """GPUs like the cluster's that a rollout server of its own needs; None where 64 are too few."""
    for size in engine_sizes(job, 64):
        if sum(engine_bytes(job, size).values()) + cluster.reserve <= cluster.gpu_memory:
            return size
    return None


def _generation(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> float:
    """Each decoded token of a wave of sequences reads the weights that the wave's tokens meet, and computes."""
    assert job.rollouts is not None
    policy, rollouts = job.members[0], job.rollouts
    gpus = setting.rollout_gpus
    if rollouts.servers:
        gpus = max(gpus, server_gpus(job, cluster) or 1)
    engines = rollouts.servers or max(1, setting.gpus // gpus)
    sequences = math.ceil(rollouts.completions / engines)
    wave = min(sequences, rollouts.max_sequences)
    met = 1.0
    if policy.shape.experts:
        layer = policy.shape.largest_layer
        met = 1 - (1 - layer.top_k / layer.num_experts) ** wave
    values = policy.parameters - policy.shape.experts * (1 - met)
    width = 4 if job.dtype == "float32" else 2
    read = values * width / gpus / (rates.memory * 1e9)
    forward = policy.shape.forward_flops(job.length) / gpus / (rates.tflops * 1e12)
    prompts = sequences * (job.length - rollouts.max_new_tokens) * forward
    return math.ceil(sequences / wave) * rollouts.max_new_tokens * max(read, wave * forward) + prompts
