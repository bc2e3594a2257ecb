"""The MoE block, forward and backward, against dense MLPs of its active size, a one-hot dispatch and transformers.

Targets at 2048 tokens, hidden 512, FFN 1024, 8 experts, top-1 + shared, fp32: at most 1.10 times two dense MLPs, at
least 8 times faster than the einsum dispatch, not slower than transformers' best `experts_implementation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import compare, medians, ratio, write
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
"""The third, batched_mm, copies the weights of each token's experts (8.6 GB here): it is made for decoding."""


class EinsumDispatch(nn.Module):
    """A one-hot dispatch as the reference does it: [T, E, C] masks move tokens into one buffer an expert.

    Where nothing may be dropped, C is the number of tokens.
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


def blocks(shape: dict[str, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    config = HunYuanConfig(hidden_size=HIDDEN, num_attention_heads=8, num_key_value_heads=8, **shape)
    ours = MoeBlock(config, 0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.02)
    dense_shared = SwiGlu(config, shape["intermediate_size"])
    dense_active = SwiGlu(config, shape["intermediate_size"] * shape["moe_topk"])
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "align": lambda x: ours(x)[0],
        "dense MLPs of the active size": lambda x: dense_shared(x) + dense_active(x),
        "one-hot einsum": EinsumDispatch(ours),
    }
    for implementation in IMPLEMENTATIONS:
        theirs_config = HunYuanMoEV1Config(
            hidden_size=HIDDEN, num_attention_heads=8, num_key_value_heads=8, head_dim=64, **shape
        )
        theirs_config._experts_implementation = implementation
        theirs = HunYuanMoEV1Moe(theirs_config, 0)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.02)
        found[f"transformers {implementation}"] = theirs
    return found


def main() -> None:
    results = {}
    for label, shape in SHAPES.items():
        x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
        variants = blocks(shape)
        torch.testing.assert_close(variants["align"](x), variants["one-hot einsum"](x), atol=1e-5, rtol=1e-4)

        def step(block: Callable[[Tensor], Tensor], x: Tensor = x) -> None:
            x.grad = None
            block(x).square().mean().backward()

        runs = {name: lambda b=block: step(b) for name, block in variants.items()}
        with_einsum = compare({name: runs[name] for name in ("align", "one-hot einsum")}, rounds=3)
        seconds = compare({name: run for name, run in runs.items() if name != "one-hot einsum"}, rounds=15)
        best = min((n for n in seconds if n.startswith("transformers")), key=lambda n: medians(seconds)[n])
        times = medians(with_einsum) | medians(seconds)
        results[label] = {
            "milliseconds": {name: round(1000 * value, 2) for name, value in times.items()},
            "align / dense": round(ratio(seconds, "align", "dense MLPs of the active size"), 3),
            "einsum / align": round(ratio(with_einsum, "one-hot einsum", "align"), 2),
            f"align / best of transformers ({best})": round(ratio(seconds, "align", best), 3),
        }
    write("moe_block", results)


if __name__ == "__main__":
    main()
