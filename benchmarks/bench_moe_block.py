"""The MoE block, forward and backward pass, against dense MLPs of its active size, a one-hot dispatch and transformers.

Targets at 2048 tokens, hidden 512, FFN 1024, 8 experts, top-1 + shared, fp32: at most 1.10 times two dense MLPs, at
least 8 times faster than the einsum dispatch, not slower than transformers' best `experts_implementation`.

Two more ratios explain the ratio to the dense MLPs on a machine. "products alone" times only the matrix products: each
expert has fewer rows, and the weights of all experts are read. "freed memory kept" is measured with a C library that
keeps freed memory (glibc with MALLOC_MMAP_MAX_=0). By default the gradient of the experts' gate_up_proj (32 MiB) is
returned to the kernel, which clears its pages again at every step; the smaller gradients of a dense MLP are not.

On a GPU: FLOP/s of the block in bf16, also relative to the FLOP/s of a dense matrix product.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import compare, in_new_process, medians, ratio, write
from torch import Tensor, nn
from transformers import HunYuanMoEV1Config
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1Moe

from align.models.hunyuan import HunYuanConfig
from align.models.hunyuan.moe import MoeBlock, SwiGlu

TOKENS, HIDDEN = 2048, 512
SHAPES = {
    "8 experts, top-1": {"num_experts": 8, "moe_topk": 1, "intermediate_size": 1024},
    "64 experts, top-8": {"num_experts": 64, "moe_topk": 8, "intermediate_size": 128},
}
IMPLEMENTATIONS = ("eager", "grouped_mm")
"""Without batched_mm, which is for decoding: it copies the expert weights of each token (gate_up_proj: 8.6 GB)."""

DENSE = "dense MLPs of the active size"
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


class EinsumDispatch(nn.Module):
    """The reference's one-hot dispatch: [T, E, C] masks move tokens into one buffer per expert.

    C is the number of tokens, so that none is dropped.
    """

    def __init__(self, block: MoeBlock):
        super().__init__()
        self.block = block

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        routing = self.block.gate(hidden_TD)
        experts = self.block.experts
        chosen = nn.functional.one_hot(routing.experts_Tk, experts.num_experts)  # [T, k, E]
        tokens, top_k, num_experts = chosen.shape
        arrival = chosen.transpose(0, 1).reshape(-1, num_experts).cumsum(0) - 1
        slots = tokens
        slot = (arrival * chosen.transpose(0, 1).reshape(-1, num_experts)).sum(-1).view(top_k, tokens).T
        weights = routing.weights_Tk[..., None] * chosen
        combine = torch.einsum("tke,tkc->tec", weights, nn.functional.one_hot(slot, slots).float())
        dispatched = torch.einsum("tec,td->ecd", (combine > 0).float(), hidden_TD)
        gate, up = torch.einsum("ecd,efd->ecf", dispatched, experts.gate_up_proj).chunk(2, dim=-1)
        outputs = torch.einsum("ecf,edf->ecd", experts.act(gate) * up, experts.down_proj)
        routed = torch.einsum("tec,ecd->td", combine, outputs).view_as(hidden_BTD)
        return routed + self.block.shared_mlp(hidden_BTD)


class Variant(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


def blocks(shape: dict[str, int]) -> dict[str, Variant]:
    torch.manual_seed(0)
    config = HunYuanConfig(hidden_size=HIDDEN, num_attention_heads=8, num_key_value_heads=8, **shape)
    ours = MoeBlock(config, 0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.02)
    shared = SwiGlu(config, shape["intermediate_size"])
    active = SwiGlu(config, shape["intermediate_size"] * shape["moe_topk"])
    found = {
        "align": Variant(lambda x: ours(x)[0], [*ours.parameters()]),
        DENSE: Variant(lambda x: shared(x) + active(x), [*shared.parameters(), *active.parameters()]),
        "one-hot einsum": Variant(EinsumDispatch(ours), [*ours.parameters()]),
    }
    for implementation in IMPLEMENTATIONS:
        theirs_config = HunYuanMoEV1Config(
            hidden_size=HIDDEN, num_attention_heads=8, num_key_value_heads=8, head_dim=64, **shape
        )
        theirs_config._experts_implementation = implementation
        theirs = HunYuanMoEV1Moe(theirs_config, 0)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.02)
        found[f"transformers {implementation}"] = Variant(theirs, [*theirs.parameters()])
    return found


def steps(variants: dict[str, Variant]) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of each variant; gradients are None at the start."""
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)

    def step(variant: Variant) -> None:
        for leaf in (x, *variant.parameters):
            leaf.grad = None
        variant.forward(x).square().mean().backward()

    return {name: lambda v=variant: step(v) for name, variant in variants.items()}


def products_alone(shape: dict[str, int]) -> float:
    """(shared + experts) / (shared + dense MLP of the active size), matrix products of forward and backward pass only.

    Tokens are distributed evenly over the experts, the best case of a router.
    """
    num_experts, top_k, width = shape["num_experts"], shape["moe_topk"], shape["intermediate_size"]

    def swiglu(rows: int, width: int, copies: int) -> Callable[[], None]:
        sizes = [(rows, HIDDEN, 2 * width), (rows, width, HIDDEN)]  # rows, into, out
        operands = [
            (torch.randn(copies, m, k), torch.randn(copies, n, k), torch.randn(copies, m, n)) for m, k, n in sizes
        ]
        results = [tuple(map(torch.empty_like, (d_out, x, weights))) for x, weights, d_out in operands]

        def run() -> None:
            for (x, weights, d_out), (out, d_x, d_weights) in zip(operands, results, strict=True):
                for i in range(copies):
                    torch.mm(x[i], weights[i].T, out=out[i])
                    torch.mm(d_out[i], weights[i], out=d_x[i])
                    torch.mm(d_out[i].T, x[i], out=d_weights[i])

        return run

    shared = swiglu(TOKENS, width, 1)
    experts = swiglu(TOKENS * top_k // num_experts, width, num_experts)
    dense = swiglu(TOKENS, width * top_k, 1)
    runs = {"experts": lambda: (shared(), experts()), "dense": lambda: (shared(), dense())}
    return ratio(compare(runs, repetitions=15), "experts", "dense")


def align_against_dense(shape: dict[str, int]) -> float:
    runs = steps(blocks(shape))
    return ratio(compare({name: runs[name] for name in ("align", DENSE)}, repetitions=15), "align", DENSE)


def on_a_gpu(device: str, tokens: int, hidden: int, width: int, num_experts: int) -> dict[str, float]:
    """bf16, top-1 + shared: FLOP/s of the block's forward and backward pass against those of one dense product."""

    def seconds(work: Callable[[], Any], repetitions: int = 20) -> float:
        times = []
        for _ in range(repetitions + 3):
            start = time.perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[3:])

    config = HunYuanConfig(
        hidden_size=hidden,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=num_experts,
        moe_topk=1,
        intermediate_size=width,
    )
    with torch.device(device):
        block = MoeBlock(config, 0).bfloat16()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        rows, matrix = torch.randn(tokens, hidden).bfloat16(), torch.randn(hidden, 2 * width).bfloat16()

    def step() -> None:
        for leaf in (x, *block.parameters()):
            leaf.grad = None
        block(x)[0].square().mean().backward()

    block_rate = 2 * 18 * tokens * hidden * width / seconds(step)  # two SwiGLUs with three products of 6 FLOPs each
    dense_rate = 4 * tokens * hidden * width / seconds(lambda: rows @ matrix)
    return {
        "block, TFLOP/s": round(block_rate / 1e12, 3),
        "dense product, TFLOP/s": round(dense_rate / 1e12, 3),
        "block / dense product": round(block_rate / dense_rate, 3),
    }


def main() -> None:
    if len(sys.argv) > 1:  # a new process, since the C library reads its settings at the start
        print(json.dumps({"ratio": align_against_dense(SHAPES[sys.argv[1]])}))
        return
    results: dict[str, Any] = {}
    for label, shape in SHAPES.items():
        variants = blocks(shape)
        x = torch.randn(1, TOKENS, HIDDEN)
        torch.testing.assert_close(
            variants["align"].forward(x), variants["one-hot einsum"].forward(x), atol=1e-5, rtol=1e-4
        )
        runs = steps(variants)
        with_einsum = compare({name: runs[name] for name in ("align", "one-hot einsum")}, repetitions=3)
        seconds = compare({name: run for name, run in runs.items() if name != "one-hot einsum"}, repetitions=15)
        best = min((n for n in seconds if n.startswith("transformers")), key=lambda n: medians(seconds)[n])
        times = medians(with_einsum) | medians(seconds)
        os.environ.update(KEEP_FREED_MEMORY)
        kept = in_new_process(label)["ratio"]
        for name in KEEP_FREED_MEMORY:
            del os.environ[name]
        results[label] = {
            "milliseconds": {name: round(1000 * value, 2) for name, value in times.items()},
            "align / dense": round(ratio(seconds, "align", DENSE), 3),
            "align / dense, freed memory kept": round(kept, 3),
            "experts / dense, products alone": round(products_alone(shape), 3),
            "einsum / align": round(ratio(with_einsum, "one-hot einsum", "align"), 2),
            f"align / best of transformers ({best})": round(ratio(seconds, "align", best), 3),
        }
    if torch.cuda.is_available():
        results["GPU, bf16"] = on_a_gpu("cuda", tokens=16384, hidden=4096, width=8192, num_experts=8)
    write("moe_block", results)


if __name__ == "__main__":
    main()
