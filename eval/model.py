"""The model under evaluation: token ids in, completions and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from align.rollout.requests import Generation, Pair, Request, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EvalModel", "Generation", "Pair", "Request", "Scored"]


class EvalModel(Protocol):
    """A language model that answers requests.

    Both methods yield (index of the request, result) in the order in which the results are known, so that they can be
    recorded before all requests are answered.

    tokenizer: the checkpoint's.
    max_length: maximum tokens of a prompt with its completion, and of a prefix with its target less one: the last token
        of a target is predicted, but not read.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """Sample a completion for each request."""
        ...

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Compute the log-probability of each target after its prefix."""
        ...

    def load(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Replace the weights by those of another checkpoint; False if that needs a new engine."""
        ...

    def close(self) -> None:
        """Release all resources; the model cannot be used afterwards."""
        ...
