"""Lines 1 and 2: the policy's forward and backward pass on this device against the CPU in fp32, and its host waits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from align.config.lora import Lora
from align.data.experience import Experience
from align.models.forward import policy_output
from align.models.lora.adapters import AnyModel, add_lora
from align.smoke.machine import Machine
from align.smoke.small import greedy_batch, perturb, small_policy
from align.smoke.table import Check, below, holds

LOGPROBS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Bound on the mean difference of the log-probabilities, in nats."""
GRADIENT = 0.05
"""Bound on the relative error of the gradient of all parameters."""
PROBABILITIES = {0.5: GRADIENT, 0.9: 0.1, 0.99: 0.2, 0.999: 0.2}
"""Bound on the gradient's error in bf16, by the median probability p of the tokens. During training p is above 0.9 for
most tokens. The gradient is proportional to 1 - p. As p approaches 1, rounding of the hidden states to bf16 changes
1 - p by several per cent."""
WAITS = 5


class Case(NamedTuple):
    """A policy, a batch and a temperature.

    bound: bound on the relative error of the gradient in bf16.
    training: run the model in train mode; the capacity limit applies only there.
    """

    name: str
    policy: AnyModel
    batch: Experience
    temperature: float
    bound: float = GRADIENT
    training: bool = False


class Pass(NamedTuple):
    """Results of a forward and backward pass.

    logprobs: log-probabilities [B, T].
    gradient: gradient of the mean log-probability, by parameter name.
    routed_experts: chosen experts [B, L, layers, k].
    """

    logprobs: Tensor
    gradient: dict[str, Tensor]
    routed_experts: Tensor | None


def compare(machine: Machine, folder: Path) -> list[Check]:
    """Run line 1. On a CPU only bf16 is compared, because fp32 on the CPU is the reference."""
    torch.set_num_threads(1)  # small matrix products gain nothing from more threads and slow down on a busy machine
    checks = []
    for case in cases():
        reference = run(case, case.policy, "cpu")
        if not case.training:  # replay the reference's routing: rounding may change a close choice
            case = case._replace(batch=replace(case.batch, routed_experts=reference.routed_experts))
        for dtype in LOGPROBS if machine.has_gpu else (torch.bfloat16,):
            policy = copy.deepcopy(case.policy).to(machine.device, dtype)
            checks.append(difference(case, dtype, run(case, policy, machine.device), reference))
    return checks


def cases() -> Iterator[Case]:
    """Yield the cases: tokens of increasing probability, an expert without tokens, a capacity limit, LoRA."""
    policy = small_policy()
    batch = greedy_batch(policy)
    for probability, bound in PROBABILITIES.items():
        yield Case(f"p = {probability}", policy, batch, temperature_for(policy, batch, probability), bound)
    yield Case("expert without tokens", policy, without_expert(policy, batch, 0), 1.0)
    capped = small_policy(capacity_factor=0.75, moe_drop_tokens=True, moe_random_routing_dropped_token=False)
    yield Case("capacity", capped, batch, 1.0, training=True)
    adapted = add_lora(copy.deepcopy(policy), Lora(rank=8, train_router=True), task="CAUSAL_LM")
    perturb(adapted)
    yield Case("LoRA", adapted, batch, 1.0)


@torch.no_grad()
def temperature_for(policy: AnyModel, batch: Experience, probability: float) -> float:
    """Temperature at which the median probability of the completion tokens is `probability`, found by bisection."""
    low, high = 1e-3, 10.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        median = policy_output(policy, batch, middle).logprobs[batch.mask.bool()].exp().median()
        low, high = (middle, high) if median > probability else (low, middle)
    return float((low * high) ** 0.5)


@torch.no_grad()
def without_expert(policy: AnyModel, batch: Experience, expert: int) -> Experience:
    """The batch with the policy's routing, except that another, not yet chosen expert replaces `expert`."""
    experts = policy_output(policy, batch, 1.0).routed_experts
    assert experts is not None
    count = policy.config.num_experts
    free = torch.stack([(experts != other).all(-1) & (other != expert) for other in range(count)], -1)
    other = free.int().argmax(-1, keepdim=True).to(experts.dtype)
    return replace(batch, routed_experts=torch.where(experts == expert, other, experts))


def run(case: Case, policy: AnyModel, device: str) -> Pass:
    """Run a forward and backward pass of the mean log-probability."""
    policy.train(case.training)
    policy.zero_grad(set_to_none=True)
    batch = case.batch.to(torch.device(device))
    output = policy_output(policy, batch, case.temperature, replay=True)
    (output.logprobs.sum() / batch.mask.sum()).backward()
    gradient = {name: p.grad.float().cpu() for name, p in policy.named_parameters() if p.grad is not None}
    routed = output.routed_experts
    return Pass(output.logprobs.detach().cpu(), gradient, None if routed is None else routed.cpu())


def difference(case: Case, dtype: torch.dtype, found: Pass, reference: Pass) -> Check:
    """WRONG if a value is not finite, a gradient is missing, or the device differs by more than the bounds."""
    what = f"{str(dtype).removeprefix('torch.')}, {case.name}"
    if found.gradient.keys() != reference.gradient.keys():
        lost = sorted(reference.gradient.keys() ^ found.gradient.keys())
        return holds(what, "the same parameters", f"gradient differs in {lost[0]}", False)
    squares = sum(value.double().square().sum() for value in reference.gradient.values())
    errors = sum((found.gradient[key] - value).double().square().sum() for key, value in reference.gradient.items())
    return below(
        what,
        dlogp=((found.logprobs - reference.logprobs).abs().mean().item(), LOGPROBS[dtype]),
        gradient=(float(torch.as_tensor(errors / squares)) ** 0.5, case.bound if dtype == torch.bfloat16 else GRADIENT),
    )


def count_waits(machine: Machine, folder: Path) -> list[Check]:
    """Run line 2: count the calls in a forward and backward pass that make the CPU wait for the GPU."""
    case = next(cases())
    policy = case.policy.to(machine.device, torch.bfloat16)
    batch = case.batch.to(torch.device(machine.device))

    def step() -> None:
        output = policy_output(policy, batch, case.temperature)
        (output.logprobs.sum() / batch.mask.sum()).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    for warning in waits:
        print(f"{warning.filename}:{warning.lineno}")
    layers = policy.config.num_hidden_layers
    return [holds("host waits", f"<= {WAITS}", f"{len(waits)} with {layers} layers", len(waits) <= WAITS)]
