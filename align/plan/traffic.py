"""Bytes that one GPU receives in a step, by what for and over which wire. A step is an optimizer step, or a PPO round.

A ring collective over n ranks gives each of them (n - 1) / n of the whole; an all-reduce is a reduce-scatter and an
all-gather (ZeRO, arXiv 1910.02054, section 7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from align.config.ppo import LOOKED_AT_ONE_IN
from align.plan.job import Job, Member
from align.plan.memory import adapter_width, value_width, weight_width
from align.plan.setting import Setting

Wire = Literal["collective", "exchange", "host", "nvme"]


class Flow(NamedTuple):
    """wire: `collective` among all ranks, `exchange` within expert-parallel groups, `host` between a GPU and its host's
    memory, `nvme` between that and the disk."""

    name: str
    wire: Wire


@dataclass(frozen=True)
class Work:
    """`count` passes of one rank through one model in a step; trained: with a backward pass."""

    member: Member
    count: int
    trained: bool


def work(job: Job, setting: Setting) -> list[Work]:
    """Every pass of one rank in a step. Under LoRA the reference is the policy without its adapters."""
    passes = setting.accumulation(job)
    policy = job.members[0]
    by_role = {member.role: member for member in job.members}
    found = [Work(member, job.updates * passes, True) for member in job.learners if member.trained != "head"]
    if job.kind == "dpo" and job.reference:
        return [*found, Work(by_role.get("reference", policy), passes, False)]
    if job.rollouts is not None:
        round_ = math.ceil(job.rollouts.completions / (setting.micro_batch * setting.gpus))
        others = [*job.members[1:], *([] if "reference" in by_role else [policy])]
        sample = math.ceil(round_ / LOOKED_AT_ONE_IN)
        found.append(Work(policy, sample if job.rollouts.trusted else round_, False))
        found += [Work(member, round_, False) for member in others]
    return found


def traffic(job: Job, setting: Setting) -> dict[Flow, float]:
    """Bytes that one GPU receives."""
    total: dict[Flow, float] = {}
    for piece in work(job, setting):
        _add(total, _pass_traffic(job, setting, piece), piece.count)
    for member in job.learners:
        _add(total, _update_traffic(job, setting, member), job.updates)
    if job.rollouts is not None:
        policy = job.members[0]
        size = weight_width(job, setting, policy) * policy.parameters * _others(setting.gpus)
        total[Flow("weights to the rollout engines", "collective")] = size
    return {flow: size for flow, size in total.items() if size > 0}


def _add(total: dict[Flow, float], found: dict[Flow, float], times: int) -> None:
    for flow, size in found.items():
        total[flow] = total.get(flow, 0.0) + times * size


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks


def _spread(setting: Setting, experts: float, rest: float) -> float:
    """Values that a rank receives when everything it works with is gathered once."""
    ep, replicas = setting.expert_parallel_size, setting.expert_replicas
    return rest * _others(setting.gpus) + experts / ep * _others(replicas)


def _pass_traffic(job: Job, setting: Setting, piece: Work) -> dict[Flow, float]:
    """Of one of the passes."""
    member = piece.member
    experts, rest = member.shape.experts, member.parameters - member.shape.experts
    gathers = (2 + setting.gradient_checkpointing) if piece.trained else 1
    width = weight_width(job, setting, member)
    found: dict[Flow, float] = {}
    if setting.deepspeed and setting.zero_stage == 3:
        found[Flow("weights gathered", "collective")] = gathers * width * _spread(setting, experts, rest)
        if setting.offload_parameters:
            fetched = gathers * width * member.parameters / setting.gpus
            found[Flow("weights from the host", "host")] = fetched
            if setting.offload_parameters == "nvme":
                found[Flow("weights from NVMe", "nvme")] = fetched
    if piece.trained and setting.deepspeed and setting.zero_stage >= 2:
        reduced = adapter_width(job, setting, member) * _spread(setting, *member.trained_counts)
        found[Flow("gradients reduced", "collective")] = reduced
    if setting.expert_parallel_size > 1:
        tokens = setting.micro_batch * job.sequences * job.length
        rows = sum(count * layer.top_k for layer, count in member.shape.kinds if layer.experts)
        sent = tokens * rows * member.shape.hidden_size * value_width(job, setting, member)
        there_and_back = 2 * gathers * _others(setting.expert_parallel_size)
        found[Flow("tokens to experts and back", "exchange")] = there_and_back * sent
    return found


def _update_traffic(job: Job, setting: Setting, member: Member) -> dict[Flow, float]:
    """What an optimizer step adds to its passes."""
    width, trained = adapter_width(job, setting, member), sum(member.trained_counts)
    found: dict[Flow, float] = {}
    if setting.gpus > 1 and setting.zero_stage < 2:
        found[Flow("gradients reduced", "collective")] = 2 * width * _spread(setting, *member.trained_counts)
    if setting.zero_stage in (1, 2):
        found[Flow("weights gathered", "collective")] = width * _spread(setting, *member.trained_counts)
    if setting.offload_optimizer:
        found[Flow("gradients and weights to and from the host", "host")] = 2 * width * trained / setting.gpus
    if setting.offload_optimizer == "nvme":
        # fp32 weights, gradients and two moments are read; all but the gradients are written again, gradients before.
        found[Flow("optimizer from and to NVMe", "nvme")] = 2 * 16 * trained / setting.gpus
    return found
