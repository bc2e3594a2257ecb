"""Requests to a model under evaluation: generation until a stop string, and log-probabilities of a target.

The result of a request depends only on the request and the model. Up to floating-point rounding it is the same in any
batch, in any order of the requests, and with any engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """One completion to sample.

    prompt_ids: token ids of the prompt, at least one.
    max_new_tokens: maximum length of the completion.
    temperature: 0 is greedy decoding.
    top_p: tokens are sampled from the smallest set of most probable tokens whose total probability is at least this.
    stop: texts that end the completion; it is truncated before the first of them.
    stop_token_ids: tokens that end the completion.
    seed: seed of the completion's own generator; without effect at temperature 0.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """The completion of a `Request`.

    token_ids: ids as sampled, including a stop token and the tokens of a stop string.
    text: decoded without special tokens, and truncated before the first stop string.
    finished: True if a stop token or stop string ended it, False if it was truncated at `max_new_tokens`.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class Pair:
    """A target whose log-probability after a prefix is wanted. Both have at least one token."""

    prefix_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of the target of a `Pair`.

    logprob: sum over the target's tokens.
    logprobs: one value per token of the target.
    greedy: True if greedy decoding after the prefix would give the target.
    """

    logprob: float
    logprobs: tuple[float, ...]
    greedy: bool


def decode_completion(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], request: Request) -> str:
    """Text of a completion without special tokens and its stop token, truncated before the first stop string."""
    ids = list(token_ids)
    if ids and ids[-1] in request.stop_token_ids:
        ids.pop()
    text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    ends = [place for stop in request.stop if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
