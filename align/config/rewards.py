"""What a completion is rewarded for: models, functions and verifiers, in any mixture.

A completion's score is the sum over the rewards of `weight * clip(normalise(score))`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from align.config.parts import RUNTIME, Positive, Section

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class RewardBase(Section):
    """What every reward has."""

    if TYPE_CHECKING:
        kind: str
    name: str | None = None
    """Its name in the log; by default the reward model's, the function's, or the kind."""
    weight: float = 1.0
    """Factor on this reward in the sum of all."""
    normalise: Literal["none", "running"] = "none"
    """running: subtract the mean and divide by the standard deviation of all scores so far, this round's included."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """After that, and before the weight, keep the score within plus and minus this (null: as it is)."""

    @property
    def label(self) -> str:
        """The name in the log and in messages."""
        return self.name or self.kind


class ModelReward(RewardBase):
    """The score of a reward model."""

    kind: Literal["model"]
    """Selects a reward model."""
    init_from: str
    """A reward_model stage of this recipe or a checkpoint folder."""

    @property
    def label(self) -> str:
        return self.name or self.init_from


class RemoteReward(RewardBase):
    """The score of a server: `align serve-reward`, or any that speaks its protocol."""

    kind: Literal["remote"]
    """Selects a server."""
    url: Annotated[str, RUNTIME]
    """Address, such as `http://127.0.0.1:8100`."""
    batch_size: Annotated[Positive, RUNTIME] = 64
    """Completions in a request."""
    timeout_s: Annotated[Seconds, RUNTIME] = 120.0
    """Seconds that a request may take, connecting and reading included."""
    retries: Annotated[int, Field(ge=0, le=20), RUNTIME] = 5
    """Further tries, 0.5, 1, 2, ... seconds apart, where there is no answer, or status 429 or 500 to 599."""
    send_rows: bool = False
    """Send the data's columns too, for a server that needs more than prompt and completion."""
    failure_score: float | None = None
    """Score of a completion for which the server sends null or no finite number (null: that stops the run)."""

    @model_validator(mode="after")
    def _is_http(self) -> RemoteReward:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and self.url.isprintable()
        except ValueError:
            usable = False
        if not usable or " " in self.url or parts.query or parts.fragment or parts.username:
            raise ValueError(f"url '{self.url}' is no address of a server; write it like http://127.0.0.1:8100")
        return self


class FunctionReward(RewardBase):
    """A Python function, run in a process of its own."""

    kind: Literal["function"]
    """Selects a Python function."""
    path: str
    """`file.py:function`, or the name of a built-in function: `reference_f1`."""
    batched: bool = True
    """true: `f(prompts, completions, rows) -> list of numbers`, called once a round; false: `f(prompt, completion, row)
    -> number`, called for each completion. Either may be `async`; one of the second sort then runs for all at once."""
    timeout_s: Annotated[Seconds, RUNTIME] = 120.0
    """Seconds that a call may take; a function that takes longer is ended."""
    failure_score: float | None = None
    """Score of a completion for which the function returns None or no finite number or, where it is called for each
    completion, raises or takes too long (null: that stops the run)."""

    @property
    def label(self) -> str:
        return self.name or self.path.rpartition("/")[2]


class MathReward(RewardBase):
    r"""1 where the final answer equals the row's, as a number or as text; else 0."""

    kind: Literal["math"]
    """Selects the comparison of final answers."""
    column: str = "answer"
    r"""The row's answer: bare, after the last `####` (GSM8K) or in the last `\boxed{}`."""
    format: Literal["any", "boxed", "hash"] = "any"
    r"""Where the completion's answer stands: in the last `\boxed{}`, after the last `####`, or (any) in the last of
    these or after the last "the answer is", and without any of them the last number counts."""


class ExactReward(RewardBase):
    """1 where the completion is the row's text, white space at both ends left out; else 0."""

    kind: Literal["exact"]
    """Selects equality of texts."""
    column: str = "answer"
    """The row's text, or a list of texts of which any will do."""
    ignore_case: bool = False
    """Compare without regard to upper and lower case."""


class RegexReward(RewardBase):
    """1 where a regular expression is found in the completion; else 0."""

    kind: Literal["regex"]
    """Selects a regular expression."""
    pattern: str
    """In Python's syntax; `(?s)`, `(?i)` and `(?m)` at its start set flags."""
    column: str | None = None
    """The pattern's first group must also equal this column of the row."""
    timeout_s: Annotated[Seconds, RUNTIME] = 10.0
    """Seconds that a completion may take: some patterns backtrack for ever."""

    @model_validator(mode="after")
    def _compiles(self) -> RegexReward:
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern '{self.pattern}' is no regular expression ({error}); mend it") from None
        if self.column is not None and groups == 0:
            raise ValueError(
                f"pattern '{self.pattern}' has no group to compare with the column '{self.column}'; put parentheses "
                "around the answer"
            )
        return self


class FormatReward(RewardBase):
    """1 where the completion is made of tagged sections in order, `<think>...</think>` and then an answer; else 0."""

    kind: Literal["format"]
    """Selects a check of tags."""
    sections: list[Annotated[str, Field(min_length=1)]] = Field(default=["think"], min_length=1)
    """Names of the tags, each of which must be opened and closed once and hold text."""
    opened: bool = False
    """The prompt already ends with the first opening tag, which the completion then lacks."""
    text_after: Literal["required", "forbidden"] = "required"
    """Whether text must follow the last section, or none may."""


class LengthReward(RewardBase):
    """1 where the completion has between min_tokens and max_tokens; outside, the less the further away."""

    kind: Literal["length"]
    """Selects a range of lengths."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Smallest length that is worth 1, the end-of-sequence token included."""
    max_tokens: Positive
    """Largest length that is worth 1."""
    buffer: Annotated[int, Field(ge=0)] = 0
    """Tokens outside the range over which the score falls from 1 to 0."""

    @model_validator(mode="after")
    def _in_order(self) -> LengthReward:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; change one")
        return self


Reward = Annotated[
    ModelReward | RemoteReward | FunctionReward | MathReward | ExactReward | RegexReward | FormatReward | LengthReward,
    Field(discriminator="kind"),
]


def _named_apart(rewards: list[Reward]) -> list[Reward]:
    labels = [reward.label for reward in rewards]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{labels.count(label)} rewards are called '{label}'; give each a `name` of its own")
    return rewards


Rewards = Annotated[list[Reward], Field(min_length=1), AfterValidator(_named_apart)]
