"""Bytes that one GPU receives per step, by purpose and link. A step is an optimizer step or a PPO iteration.

In a ring collective over n ranks, each rank receives (n - 1) / n of the data. An all-reduce is a reduce-scatter and an
all-gather (ZeRO, arXiv 1910.02054, section 7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from align.config.ppo import LOGPROBS_OF_ONE_IN
from align.plan.job import Job, Member
from align.plan.memory import adapter_width, value_width, weight_width
from align.plan.setting import Setting

Link = Literal["collective", "all-to-all", "host", "nvme"]


class Flow(NamedTuple):
    """The purpose of a transfer and its link.

    link: `collective` among all ranks, `all-to-all` within expert-parallel groups, `host` between a GPU and its host's
    memory, `nvme` between host memory and disk.
    """

    name: str
    link: Link


@dataclass(frozen=True)
class Work:
    """`count` forward passes of one rank through one model per step; `trained` adds the backward passes."""

    member: Member
    count: int
    trained: bool


def work(job: Job, setting: Setting) -> list[Work]:
    """All passes of one rank per step. The reference of DPO and KTO has the policy's sizes."""
    passes = setting.accumulation(job)
    policy = job.members[0]
    by_role = {member.role: member for member in job.members}
    found = [Work(member, job.updates * passes, True) for member in job.learners if member.trained != "head"]
    if job.forward_passes:
        return [*found, Work(policy, job.forward_passes * passes, False)]
    if job.rollouts is not None:
        round_ = math.ceil(job.rollouts.completions / (setting.micro_batch * setting.gpus))
        others = [*job.members[1:], *([] if "reference" in by_role else [policy])]
        sample = math.ceil(round_ / LOGPROBS_OF_ONE_IN)
        found.append(Work(policy, sample if job.rollouts.as_old_logprobs else round_, False))
        found += [Work(member, round_, False) for member in others]
    return found


def traffic(job: Job, setting: Setting) -> dict[Flow, float]:
    """Bytes that one GPU receives per step."""
    total: dict[Flow, float] = {}
    for piece in work(job, setting):
        _add(total, _pass_traffic(job, setting, piece), piece.count)
    for member in job.learners:
        _add(total, _update_traffic(job, setting, member), job.updates)
    if job.rollouts is not None:
        policy = job.members[0]
        size = weight_width(job, setting, policy) * policy.parameters * _received_share(setting.gpus)
        total[Flow("weights for the rollout engines", "collective")] = size
    return {flow: size for flow, size in total.items() if size > 0}


def _add(total: dict[Flow, float], found: dict[Flow, float], times: int) -> None:
    for flow, size in found.items():
        total[flow] = total.get(flow, 0.0) + times * size


def _received_share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _ring_values(setting: Setting, experts: float, rest: float) -> float:
    """Values that a rank receives when all weights it computes with are gathered once."""
    ep, replicas = setting.expert_parallel_size, setting.expert_replicas
    return rest * _received_share(setting.gpus) + experts / ep * _received_share(replicas)


def _pass_traffic(job: Job, setting: Setting, piece: Work) -> dict[Flow, float]:
    """Bytes received for one pass, with its backward pass if the model is trained."""
    member = piece.member
    experts, rest = member.shape.experts, member.parameters - member.shape.experts
    gathers = (2 + setting.gradient_checkpointing) if piece.trained else 1
    width = weight_width(job, setting, member)
    found: dict[Flow, float] = {}
    if setting.deepspeed and setting.zero_stage == 3:
        found[Flow("weight all-gather", "collective")] = gathers * width * _ring_values(setting, experts, rest)
        if setting.offload_parameters:
            fetched = gathers * width * member.parameters / setting.gpus
            found[Flow("weights from host memory", "host")] = fetched
            if setting.offload_parameters == "nvme":
                found[Flow("weights from NVMe", "nvme")] = fetched
    if piece.trained and setting.deepspeed and setting.zero_stage >= 2:
        reduced = adapter_width(job, setting, member) * _ring_values(setting, *member.trained_counts)
        found[Flow("gradient reduction", "collective")] = reduced
    if setting.expert_parallel_size > 1:
        tokens = setting.micro_batch * job.sequences * job.length
        rows = sum(count * layer.top_k for layer, count in member.shape.kinds if layer.experts)
        sent = tokens * rows * member.shape.hidden_size * value_width(job)
        dispatch_and_combine = 2 * gathers * _received_share(setting.expert_parallel_size)
        found[Flow("expert dispatch and combine", "all-to-all")] = dispatch_and_combine * sent
    return found


def _update_traffic(job: Job, setting: Setting, member: Member) -> dict[Flow, float]:
    """Bytes received for an optimizer step, without those of its forward and backward passes."""
    width, trained = adapter_width(job, setting, member), sum(member.trained_counts)
    found: dict[Flow, float] = {}
    if setting.gpus > 1 and setting.zero_stage < 2:
        found[Flow("gradient reduction", "collective")] = 2 * width * _ring_values(setting, *member.trained_counts)
    if setting.zero_stage in (1, 2):
        found[Flow("weight all-gather", "collective")] = width * _ring_values(setting, *member.trained_counts)
    if setting.offload_optimizer:
        found[Flow("optimizer offload", "host")] = 2 * width * trained / setting.gpus
    if setting.offload_optimizer == "nvme":
        # fp32 weights, gradients and two moments: each is read once and written once per step.
        found[Flow("optimizer swap on NVMe", "nvme")] = 2 * 16 * trained / setting.gpus
    return found
