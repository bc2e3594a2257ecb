"""Line 3: a vLLM engine beside a trainer starts, sleeps, wakes, loads new weights and agrees with the trainer."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import torch

from align.config.rollout import Rollout
from align.data.experience import build_experience
from align.models.forward import policy_output
from align.models.lora.adapters import AnyModel
from align.models.weights import published_weights
from align.rollout.base import Completion, RolloutEngine, SamplingSettings
from align.rollout.build import build_engine
from align.smoke.machine import Machine
from align.smoke.small import perturb, small_policy
from align.smoke.table import Check, below, fast, holds, skipped

SAMPLING = SamplingSettings(max_new_tokens=24, seed=1, n=4)
PROMPTS = [[5, 6, 7, 8], list(range(100, 140))]
MEAN, LARGEST = {"float32": 1e-4, "bfloat16": 2e-2}, {"float32": 1e-3, "bfloat16": 1.0}
"""Bounds on the mean and largest difference between the engine's and the trainer's log-probabilities, in nats."""


def check(machine: Machine, folder: Path) -> list[Check]:
    """Run line 3."""
    if find_spec("vllm") is None:
        return [skipped("engine", "vLLM is not installed: align doctor")]
    dtype = "bfloat16" if machine.has_gpu else "float32"
    policy = small_policy().to(getattr(torch, dtype))
    policy.save_pretrained(folder / "engine")
    policy.to(machine.device)
    # Stands for the memory that a trainer holds. vLLM must start although a quarter of the GPU's memory is in use.
    held = (
        torch.empty(int(0.25 * torch.cuda.mem_get_info()[1]), dtype=torch.uint8, device="cuda")
        if machine.has_gpu
        else None
    )
    cache = 2.0 if machine.has_gpu else 0.05
    rollout = Rollout(max_model_length=128, max_sequences=16, cache_gib=cache, sleep=True)
    clock = time.perf_counter()
    engine = build_engine(folder / "engine", rollout, dtype=dtype, seed=0)
    checks = [fast("start beside a trainer", time.perf_counter() - clock, 60, "s", at_most=True)]
    try:
        checks.append(mismatch("log-probabilities", engine, policy, dtype))
        stale = engine.generate(PROMPTS, SAMPLING)
        perturb(policy)
        largest = differences(stale, policy).max().item()
        checks.append(holds("old samples, new weights", "> 0.1", f"largest {largest:.2g}", largest > 0.1))
        checks += sleep_and_wake(engine, machine, cache)
        report = engine.update_weights(published_weights(policy), 1)
        checks.append(fast("weight update", report.seconds, 1.0, "s", at_most=True))
        checks.append(mismatch("the same, new weights", engine, policy, dtype))
    finally:
        engine.close()
        del held
    return checks


def sleep_and_wake(engine: RolloutEngine, machine: Machine, cache_gib: float) -> list[Check]:
    """On a GPU the KV cache's memory must be free while the engine sleeps. On a CPU sleep and wake are no-ops."""
    if not machine.has_gpu:
        engine.sleep()
        engine.wake()
        return [skipped("memory while asleep", "needs a GPU")]
    awake = torch.cuda.mem_get_info()[0]
    engine.sleep()
    freed = (torch.cuda.mem_get_info()[0] - awake) / 2**30
    engine.wake()
    bound = 0.9 * cache_gib
    return [holds("memory while asleep", f">= {bound:.1f} GiB free", f"{freed:.1f} GiB", freed >= bound)]


def mismatch(what: str, engine: RolloutEngine, policy: AnyModel, dtype: str) -> Check:
    """Sample, and compare the engine's log-probabilities with the trainer's forward pass."""
    found = differences(engine.generate(PROMPTS, SAMPLING), policy)
    return below(what, mean=(found.mean().item(), MEAN[dtype]), largest=(found.max().item(), LARGEST[dtype]))


@torch.no_grad()
def differences(samples: list[list[Completion]], policy: AnyModel) -> torch.Tensor:
    """|log p(engine) - log p(trainer)| of every sampled token."""
    rows = [completion for group in samples for completion in group]
    batch = build_experience([r.prompt_ids for r in rows], [r.token_ids for r in rows], [r.logprobs for r in rows])
    batch = batch.to(policy.device)
    logprobs = policy_output(policy, batch, SAMPLING.temperature).logprobs
    return (logprobs - batch.rollout_logprobs)[batch.mask.bool()].abs()
