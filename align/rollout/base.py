"""What the trainer knows of a generation engine: token ids in, token ids out, new weights now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy
from torch import Tensor

from align.errors import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample: from softmax(logits / temperature) over the whole vocabulary. No top-p, no top-k:
    their renormalisation would bias an importance ratio.

    temperature 0 means greedy. `seed` fixes every completion: the same prompts, settings and weights give the
    same tokens. `stop_token_ids` end a completion and are part of it. `n` completions are drawn for each
    prompt.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1


@dataclass(frozen=True)
class Completion:
    """One sampled sequence.

    logprobs: of each of `token_ids` under the distribution that was sampled, temperature included (greedy:
    softmax(logits)). finished: ended by a stop token, which is then the last of `token_ids`; otherwise it was
    cut at `max_new_tokens`. A completion has at least one token: one whose first token stops it is that token.
    weight_version: the update of the weights that sampled it; 0 are the checkpoint's.

    routed_experts: where the engine was built with `rollout.return_routing`, the experts that prompt and completion
    went to, int16 [layers, tokens - 1, k] in the router's order, best first. The last token was sampled but never
    computed. -1 stands in layers without routed experts, and where a layer has fewer than k.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    weight_version: int
    routed_experts: numpy.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SyncReport:
    """What one update of the weights moved, and how long it took.

    bytes: of the weights, in the engine's type. seconds: until every engine holds and has proved them. checksum: of all
    weights, computed by the sender and, for an engine on one device, from the parameters that it computes with.
    """

    bytes: int
    seconds: float
    version: int
    buckets: int = 1
    checksum: str = ""
    engines: int = 1

    def metrics(self) -> dict[str, float]:
        """For a log."""
        return {
            "sync/mib": round(self.bytes / 2**20, 3),
            "time/weights": round(self.seconds, 4),
            "sync/buckets": self.buckets,
            "sync/engines": self.engines,
        }


@dataclass(frozen=True)
class GenerationReport:
    """What the last call of `generate` did.

    cached_tokens: prompt tokens whose keys and values were there from an earlier prompt with the same beginning.
    retried: completions that were started again because their server failed.
    """

    seconds: float
    completions: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    retried: int = 0

    def metrics(self) -> dict[str, float]:
        """For a log."""
        return {
            "speed/rollout": round(self.completion_tokens / max(self.seconds, 1e-9), 1),
            "rollout/prompt_tokens": self.prompt_tokens,
            "rollout/cached_share": round(self.cached_tokens / max(self.prompt_tokens, 1), 4),
            "rollout/retried": self.retried,
        }


WeightSource = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives the stream of published weights from its beginning at each call."""


class RolloutEngine(Protocol):
    """Generates completions with weights that the trainer replaces now and then."""

    last_generation: GenerationReport | None
    last_sync: SyncReport | None

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in the prompts' order."""
        ...

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """Replace all weights; names are those of the published layout (`weights.published_weights`)."""
        ...

    def offer_weights(self, source: WeightSource) -> None:
        """Where the weights of the last update can be read again, for an engine that has to start over.

        Called after `update_weights`. The stream is refused if it is not the one that was sent, so a trainer may go on
        and change its weights.
        """
        ...

    def sleep(self) -> None:
        """Give the accelerator's memory to the trainer until `wake`; nothing happens on a CPU."""
        ...

    def wake(self) -> None:
        """Take the memory back; weights are as before, cached prefixes are gone."""
        ...

    def close(self) -> None:
        """Give back memory. The engine cannot be used afterwards."""
        ...


def completion_seed(seed: int, prompt: int, sample: int) -> int:
    """A seed for one completion's generator: 63 bits, distinct for each (prompt index, sample index)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + prompt * 0xBF58476D1CE4E5B9 + sample * 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (mixed ^ (mixed >> 32)) >> 1


def check_prompts(prompts: list[list[int]], sampling: SamplingSettings, max_length: int) -> None:
    """Every prompt must leave room for its completion, which would else be cut without a word."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty: give at least one token, for example the start token.")
        if len(prompt) + sampling.max_new_tokens > max_length:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {sampling.max_new_tokens} it "
                f"exceeds max_model_length {max_length}: shorten prompts (max_prompt_length) or raise "
                "rollout.max_model_length."
            )
