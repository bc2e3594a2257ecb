"""Completions as tensors, saved in checkpoints so that a resumed run does not sample them again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from align.rollout.base import Completion

PREFIX = "drawn."


def completion_tensors(position: int, completions: Sequence[Completion]) -> dict[str, Tensor]:
    """Flat tensors of the completions sampled from `position` of the prompt stream on; log-probabilities in float64."""
    tensors = {
        f"{PREFIX}position": torch.tensor(position),
        f"{PREFIX}prompt_lengths": torch.tensor([len(c.prompt_ids) for c in completions]),
        f"{PREFIX}lengths": torch.tensor([len(c.token_ids) for c in completions]),
        f"{PREFIX}prompt_ids": torch.tensor([i for c in completions for i in c.prompt_ids]),
        f"{PREFIX}token_ids": torch.tensor([i for c in completions for i in c.token_ids], dtype=torch.long),
        f"{PREFIX}logprobs": torch.tensor([p for c in completions for p in c.logprobs], dtype=torch.float64),
        f"{PREFIX}finished": torch.tensor([c.finished for c in completions]),
        f"{PREFIX}weight_version": torch.tensor([c.weight_version for c in completions]),
    }
    routings = [c.routed_experts for c in completions if c.routed_experts is not None]
    if routings:
        # Concatenated along the token axis: [layers, tokens - 1, k] of each completion.
        tensors[f"{PREFIX}routed_experts"] = torch.from_numpy(numpy.concatenate(routings, axis=1))
    return tensors


def stored_completions(tensors: dict[str, Tensor]) -> tuple[int, list[Completion]] | None:
    """(position, completions) stored among other tensors, or None if there are none."""
    found = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    if not found:
        return None
    lengths, prompt_lengths = found["lengths"].tolist(), found["prompt_lengths"].tolist()
    prompts, tokens = found["prompt_ids"].split(prompt_lengths), found["token_ids"].split(lengths)
    logprobs = found["logprobs"].split(lengths)
    flags = zip(found["finished"].tolist(), found["weight_version"].tolist(), strict=True)
    routings: Sequence[Tensor | None] = [None] * len(tokens)
    if (routed := found.get("routed_experts")) is not None:
        computed = [max(p + n - 1, 0) for p, n in zip(prompt_lengths, lengths, strict=True)]
        routings = routed.split(computed, dim=1)
    return int(found["position"]), [
        Completion(
            prompt.tolist(),
            token_ids.tolist(),
            values.tolist(),
            finished,
            version,
            None if routing is None else routing.numpy(),
        )
        for prompt, token_ids, values, (finished, version), routing in zip(
            prompts, tokens, logprobs, flags, routings, strict=True
        )
    ]
