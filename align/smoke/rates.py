"""Line 4: FLOP/s of a dense product, of an MoE block and of the loss head, against the device's peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from align.config.presets import DEFAULT_FAMILY
from align.losses.linear_head import linear_logprobs
from align.models.family import family
from align.smoke.machine import Machine, synchronize
from align.smoke.table import Check, fast

GROUPED, HEAD = 0.5, 0.4
"""Estimated shares of the peak that a forward and backward pass reaches, in the MoE block and in the loss head."""


class Sizes(NamedTuple):
    tokens: int
    hidden: int
    width: int
    experts: int
    vocabulary: int
    repetitions: int


ON_GPU = Sizes(tokens=16_384, hidden=2048, width=1024, experts=16, vocabulary=49_152, repetitions=20)
ON_CPU = Sizes(tokens=512, hidden=256, width=256, experts=4, vocabulary=4096, repetitions=3)


def measure(machine: Machine, folder: Path) -> list[Check]:
    """Run line 4: in bf16 on a GPU, and in fp32 on a CPU, because few CPUs have bf16 multiplication."""
    sizes, dtype = (ON_GPU, torch.bfloat16) if machine.has_gpu else (ON_CPU, torch.float32)
    with torch.device(machine.device):
        dense = dense_product(sizes, dtype)
        grouped = grouped_products(sizes, dtype)
        head = loss_head(sizes, dtype)
    peak = machine.peak_flops
    unit = "TFLOP/s" if machine.has_gpu else "GFLOP/s"
    scale = 1e12 if machine.has_gpu else 1e9
    checks = []
    for what, (work, flops), share in (
        ("dense product", dense, 0.6),
        ("MoE block, both passes", grouped, GROUPED),
        ("loss head, both passes", head, HEAD),
    ):
        bound = None if peak is None else share * peak / scale
        checks.append(fast(what, flops / seconds(work, sizes.repetitions, machine) / scale, bound, unit))
    return checks


def seconds(work: Callable[[], object], repetitions: int, machine: Machine) -> float:
    """Median seconds per call of `work`, after two warm-up calls."""
    times = []
    for _ in range(repetitions + 2):
        synchronize(machine)
        clock = time.perf_counter()
        work()
        synchronize(machine)
        times.append(time.perf_counter() - clock)
    return statistics.median(times[2:])


def dense_product(sizes: Sizes, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """(function that multiplies all tokens by one matrix, its FLOPs per call)."""
    rows = torch.randn(sizes.tokens, sizes.hidden, dtype=dtype)
    matrix = torch.randn(sizes.hidden, 2 * sizes.width, dtype=dtype)
    return lambda: rows @ matrix, 4.0 * sizes.tokens * sizes.hidden * sizes.width


def grouped_products(sizes: Sizes, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """(forward and backward pass of an MoE block with top-2 routing and a shared expert, FLOPs of its products)."""
    kind: Any = family(DEFAULT_FAMILY)
    config = kind.config(
        vocab_size=64,
        num_hidden_layers=1,
        hidden_size=sizes.hidden,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=sizes.experts,
        moe_topk=2,
        intermediate_size=sizes.width,
    )
    policy: Any = kind.policy(config)
    block = policy.model.layers[0].mlp.to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    hidden = torch.randn(1, sizes.tokens, sizes.hidden, dtype=dtype, requires_grad=True)

    def work() -> None:
        for leaf in (hidden, *block.parameters()):
            leaf.grad = None
        block(hidden)[0].square().mean().backward()

    # Three SwiGLUs per token, each with three matrix products; 2 FLOPs forward and 4 backward per weight.
    return work, 3 * 18.0 * sizes.tokens * sizes.hidden * sizes.width


def loss_head(sizes: Sizes, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """(forward and backward pass of the log-probabilities, FLOPs of the four matrix products that these need)."""
    hidden = torch.randn(sizes.tokens, sizes.hidden, dtype=dtype, requires_grad=True)
    weight = (torch.randn(sizes.vocabulary, sizes.hidden) * 0.02).to(dtype).requires_grad_()
    tokens = torch.randint(sizes.vocabulary, (sizes.tokens,))

    def work() -> None:
        hidden.grad = weight.grad = None
        linear_logprobs(hidden, weight, tokens)[0].mean().backward()

    return work, 8.0 * sizes.tokens * sizes.hidden * sizes.vocabulary
