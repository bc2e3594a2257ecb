"""Peak memory of supervised fine-tuning of one family, against the plan."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from align.config.parts import Optimizer
from align.models.family import family
from align.plan.job import Job, Member
from align.plan.memory import memory
from align.plan.setting import setting_of
from align.plan.shape import shape_of
from align.train.objectives import CrossEntropy
from align.train.optimizer import build_optimizer
from align.train.passes import Example, PackedPass, totals_of
from tests.tiny_families import VOCABULARY, wide_config

ROWS, LENGTH, STEPS = 8, 160, 3  # longer than the sequences for which attention on a CPU has code of its own
LIMIT = 0.05


def check_plan(model_type: str) -> float:
    """Peak memory of the steps of a model with hidden size 256, as counted by torch's allocator, against what `align
    plan` computes from its configuration; relative."""
    torch.manual_seed(0)
    config: Any = wide_config(model_type)
    model: Any = family(model_type).policy(config).train()
    optimizer = build_optimizer(model, Optimizer())
    mask = torch.arange(LENGTH) > 0
    examples = [Example((torch.randint(5, VOCABULARY, (LENGTH,)),), (mask,)) for _ in range(ROWS)]
    packed = PackedPass(examples, torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        start = time.time_ns()
        for _ in range(STEPS):
            found = CrossEntropy().measure(model, packed, totals_of(examples))
            loss = found.loss if found.router is None else found.loss + found.router.loss(config)
            loss.backward()
            del found, loss
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    measured = peak_of(profiler, start, sum(parameter.nbytes for parameter in model.parameters()))
    policy = Member("policy", shape_of(model_type, config.to_dict()), "all")
    job = Job("sft", "sft", (policy,), "float32", ROWS, ROWS, LENGTH)
    planned = memory(job, setting_of(job, None, 1), on_cpu=True).gpu_bytes
    error = planned / measured - 1
    assert abs(error) < LIMIT, f"planned {planned / 1e6:,.1f} MB, measured {measured / 1e6:,.1f} MB"
    return abs(error)


def peak_of(profiler: Any, start: int, now: int) -> int:
    """Peak bytes after `start`, in nanoseconds since the epoch, when `now` bytes were allocated."""
    peak = now
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.start_ns() >= start:
            now += event.nbytes()
            peak = max(peak, now)
    return peak
