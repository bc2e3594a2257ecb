"""The interface between trainer and generation engine: prompts and completions as token ids, and weight updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy
from torch import Tensor

from align.errors import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling from softmax(logits / temperature) over the whole vocabulary.

    Top-p and top-k are not supported, because their renormalisation would bias importance ratios.

    max_new_tokens: maximum length of a completion.
    temperature: 0 means greedy decoding.
    seed: the same seed, prompts, settings and weights give the same tokens, up to floating-point rounding.
    stop_token_ids: tokens that end a completion; the stop token is part of it.
    n: completions per prompt.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1


@dataclass(frozen=True)
class Completion:
    """One sampled sequence.

    prompt_ids: token ids of the prompt.
    token_ids: token ids of the completion, at least one; a stop token is included.
    logprobs: log-probability of each of `token_ids` under the sampled distribution, temperature included (greedy:
        softmax(logits)).
    finished: True if a stop token ended the completion, False if it was truncated at `max_new_tokens`.
    weight_version: version of the weights that sampled it; 0 for the initial checkpoint.
    routed_experts: with `rollout.return_routing`, the experts of prompt and completion, int16 [layers, tokens - 1, k],
        in any order. The last token was sampled but never fed to the model, so it has no routing. Values are -1 in
        layers without routed experts and beyond a layer's k.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    weight_version: int
    routed_experts: numpy.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SyncReport:
    """Size and duration of one weight update.

    bytes: size of the weights in the engine's dtype.
    seconds: time until every engine has loaded and verified them.
    version: version of the new weights.
    buckets: number of buckets sent.
    checksum: digest of all weights as sent; '' if the engine shares the trainer's process without a transfer. A vLLM
        engine has compared its own digests with the sender's. On one device these are digests of the live parameters,
        on several devices digests of the received tensors.
    engines: number of engines that took the update.
    """

    bytes: int
    seconds: float
    version: int
    buckets: int = 1
    checksum: str = ""
    engines: int = 1

    def metrics(self) -> dict[str, float]:
        """Metrics of the update for the log."""
        return {
            "sync/mib": round(self.bytes / 2**20, 3),
            "time/weights": round(self.seconds, 4),
            "sync/buckets": self.buckets,
            "sync/engines": self.engines,
        }


@dataclass(frozen=True)
class GenerationReport:
    """Counts and duration of one `generate` call.

    seconds: duration of the call.
    completions: number of completions.
    prompt_tokens: prompt tokens, counted once per completion.
    completion_tokens: sampled tokens.
    cached_tokens: prompt tokens served from the prefix cache.
    retried: completions started again because their server failed.
    """

    seconds: float
    completions: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    retried: int = 0

    def metrics(self) -> dict[str, float]:
        """Metrics of the call for the log."""
        return {
            "speed/rollout": round(self.completion_tokens / max(self.seconds, 1e-9), 1),
            "rollout/prompt_tokens": self.prompt_tokens,
            "rollout/cached_share": round(self.cached_tokens / max(self.prompt_tokens, 1), 4),
            "rollout/retried": self.retried,
        }


SLEEP_LEVEL = 2
"""vLLM's level of sleep: 2 drops the weights, 1 would copy them to host memory and back."""

WeightSource = Callable[[], Iterator[tuple[str, Tensor]]]
"""Function that returns a new iterator over the policy's weights, under Hugging Face names, at each call."""


class RolloutEngine(Protocol):
    """Generates completions with weights that the trainer updates."""

    last_generation: GenerationReport | None
    last_sync: SyncReport | None

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        """Sample `sampling.n` completions for each prompt; the result is in the order of the prompts."""
        ...

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """Replace all weights; names and shapes are those of the Hugging Face checkpoint
        (`models.weights.published_weights`)."""
        ...

    def offer_weights(self, source: WeightSource) -> None:
        """Set the source from which a restarted engine can get the weights of the last update again.

        Called after `update_weights`. The trainer may change its weights afterwards: an engine refuses weights whose
        checksum differs from that of the last update.
        """
        ...

    def sleep(self) -> None:
        """Release the accelerator's memory to the trainer until `wake`; a no-op on a CPU.

        Callers update the weights after `wake`, because a sleeping engine may have dropped them.
        """
        ...

    def wake(self) -> None:
        """Allocate the memory again; the prefix cache is then empty."""
        ...

    def close(self) -> None:
        """Release all resources; the engine cannot be used afterwards."""
        ...


def completion_seed(seed: int, prompt: int, sample: int) -> int:
    """Seed of one completion's generator: a 63-bit hash of seed, prompt index and sample index."""
    mixed = (seed * 0x9E3779B97F4A7C15 + prompt * 0xBF58476D1CE4E5B9 + sample * 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (mixed ^ (mixed >> 32)) >> 1


def check_prompts(prompts: list[list[int]], sampling: SamplingSettings, max_length: int) -> None:
    """Raise UserError if a prompt is empty or leaves too few tokens for its completion."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty; pass at least one token, such as BOS.")
        if len(prompt) + sampling.max_new_tokens > max_length:
            raise UserError(
                f"prompt {index}: its {len(prompt)} tokens and max_new_tokens {sampling.max_new_tokens} exceed "
                f"max_model_length {max_length}. Shorten the prompt, lower max_new_tokens, or raise "
                "rollout.max_model_length."
            )
