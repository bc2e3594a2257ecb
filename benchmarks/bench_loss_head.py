"""The chunked loss head against the plain one: time, peak memory and values, at Hunyuan-Large's vocabulary.

Targets: at most 10 % of the plain head's extra memory, at most 1.1 times its time, values equal to 1e-6 (relative).
"""

from __future__ import annotations

import json
import sys

import torch
from harness import PeakMemory, compare, in_new_process, medians, ratio, write

from align.losses.linear_head import linear_cross_entropy, linear_logprobs

TOKENS, HIDDEN, VOCABULARY = 4096, 512, 129_024


def inputs(frozen_head: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.02).requires_grad_(not frozen_head)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,)), torch.randn(TOKENS)


def plain_cross_entropy(hidden, weight, targets, _):
    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets)


def plain_logprobs(hidden, weight, targets, factors):
    logits = hidden @ weight.T
    logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    with torch.no_grad():
        every = logits.log_softmax(-1)
        entropy = -(every.exp() * every).sum(-1)
    return (logprobs * factors).sum() + 0 * entropy.sum()


def chunked_cross_entropy(hidden, weight, targets, _):
    return linear_cross_entropy(hidden, weight, targets)[0]


def chunked_logprobs(hidden, weight, targets, factors):
    logprobs, entropy, *_ = linear_logprobs(hidden, weight, targets)
    return (logprobs * factors).sum() + 0 * entropy.sum()


WAYS = {
    "cross_entropy": (plain_cross_entropy, chunked_cross_entropy),
    "logprobs_and_entropy": (plain_logprobs, chunked_logprobs),
}


def step(way, tensors) -> float:
    hidden, weight, *_ = tensors
    hidden.grad = weight.grad = None
    loss = way(*tensors)
    loss.backward()
    return loss.item()


def peak(name: str, chunked: int, frozen_head: bool) -> dict[str, float]:
    """Extra peak resident memory of the forward and backward pass, in a new process, not counting the gradients."""
    tensors = inputs(frozen_head)
    hidden, weight, *_ = tensors
    for tensor in (hidden, weight):
        if tensor.requires_grad:
            tensor.grad = torch.zeros_like(tensor) + 1e-30  # touched, so that its memory is resident
    with PeakMemory() as memory:
        way = WAYS[name][chunked]
        way(*tensors).backward()
    return {"bytes": memory.bytes}


def main() -> None:
    if len(sys.argv) > 1:
        name, chunked, frozen = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "frozen"
        print(json.dumps(peak(name, chunked, frozen)))
        return
    results: dict[str, dict] = {"shape": {"tokens": TOKENS, "hidden": HIDDEN, "vocabulary": VOCABULARY}}
    for name, (plain, chunked) in WAYS.items():
        for head in ("trained", "frozen"):
            tensors = inputs(head == "frozen")
            values = [step(way, tensors) for way in (plain, chunked)]
            seconds = compare(
                {"plain": lambda: step(plain, tensors), "chunked": lambda: step(chunked, tensors)},  # noqa: B023
                repetitions=2,
            )
            bytes_ = {
                label: in_new_process(name, str(i), head)["bytes"] for i, label in enumerate(("plain", "chunked"))
            }
            results[f"{name}, head {head}"] = {
                "seconds": medians(seconds),
                "time_ratio": round(ratio(seconds, "chunked", "plain"), 3),
                "peak_extra_bytes": bytes_,
                "memory_ratio": round(bytes_["chunked"] / bytes_["plain"], 4),
                "relative_difference": abs(values[1] - values[0]) / abs(values[0]),
            }
    write("loss_head", results)


if __name__ == "__main__":
    main()
