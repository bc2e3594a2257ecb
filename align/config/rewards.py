"""Rewards: models, servers, functions and verifiers, in any mixture.

The score of a completion is the sum over its rewards of `weight * clip(normalise(score))`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from align.config.section import RUNTIME, Location, Positive, Section
from align.config.server_url import require_server_url

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class RewardBase(Section):
    """Settings of every reward."""

    if TYPE_CHECKING:
        kind: str
    name: str | None = None
    """Name in logs and messages. Default: the name of the reward model or function, otherwise the kind."""
    weight: float = 1.0
    """Weight of this reward in the sum."""
    normalise: Literal["none", "running"] = "none"
    """running: subtract the mean and divide by the standard deviation of all scores so far, including the current
    iteration's."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Clip the normalised score to plus and minus this value, before the weight is applied. Default: no clipping."""

    @property
    def label(self) -> str:
        """Name in logs and messages."""
        return self.name or self.kind


class ModelReward(RewardBase):
    """Score of a reward model."""

    kind: Literal["model"]
    """Selects a reward model."""
    init_from: str
    """A `reward_model` stage of this recipe, or a checkpoint folder."""

    @property
    def label(self) -> str:
        return self.name or self.init_from


class RemoteReward(RewardBase):
    """Score of an HTTP server: `align serve-reward`, or any server with the same protocol (docs/rewards.md)."""

    kind: Literal["remote"]
    """Selects an HTTP server."""
    url: Annotated[str, RUNTIME]
    """URL of the server, for example `http://127.0.0.1:8100`."""
    batch_size: Annotated[Positive, RUNTIME] = 64
    """Maximum number of completions per request."""
    timeout_s: Annotated[Seconds, RUNTIME] = 120.0
    """Timeout of a request in seconds, including the connection."""
    retries: Annotated[int, Field(ge=0, le=20), RUNTIME] = 5
    """Number of retries after a failed connection, a timeout, or status 429 or 500 to 599. The delays are 0.5, 1, 2,
    ... seconds."""
    send_rows: bool = False
    """Also send the columns of the data, for servers that need more than prompt and completion."""
    failure_score: float | None = None
    """Score of completions for which the server returns null or a number that is not finite. Default: stop the run."""

    @model_validator(mode="after")
    def _is_http(self) -> RemoteReward:
        require_server_url(self.url, "http://127.0.0.1:8100")
        return self


class FunctionReward(RewardBase):
    """Score of a Python function, which runs in a separate process."""

    kind: Literal["function"]
    """Selects a Python function."""
    path: Location
    """The function as `file.py:function`, or the built-in function `reference_f1`."""
    batched: bool = True
    """true: `f(prompts, completions, rows) -> list of numbers`, called once per iteration. false: `f(prompt,
    completion, row) -> number`, called once per completion, concurrently if the function is `async`."""
    timeout_s: Annotated[Seconds, RUNTIME] = 120.0
    """Timeout of a call in seconds. A function that takes longer is terminated."""
    failure_score: float | None = None
    """Score of completions for which the function returns None or a number that is not finite, or, with `batched:
    false`, raises or times out. Default: stop the run."""

    @property
    def label(self) -> str:
        return self.name or self.path.rpartition("/")[2]


class MathReward(RewardBase):
    r"""1 if the final answer of the completion equals the row's answer, as a number or as text, otherwise 0."""

    kind: Literal["math"]
    """Selects the comparison of final answers."""
    column: str = "answer"
    r"""Column with the row's answer: the bare answer, or a text with it after the last `####` (GSM8K) or in the last
    `\boxed{}`."""
    format: Literal["any", "boxed", "hash"] = "any"
    r"""Position of the answer in the completion. boxed: in the last `\boxed{}`. hash: after the last `####`. any: after
    the last of these marks and of "the answer is", "Answer:" and "A:"; without a mark, the last number."""

    symbolic: bool = False
    """true: also accept an answer that is equal by algebra, for example `2(x+1)` for `2x+2`, by math-verify."""
    timeout_s: Seconds = 10.0
    """Timeout of one comparison by algebra in seconds. A completion that takes longer is counted as a failure."""


class ChoiceReward(RewardBase):
    """1 if the completion chooses the row's letter (multiple choice), otherwise 0."""

    kind: Literal["choice"]
    """Selects the comparison of chosen letters."""
    column: str = "answer"
    """Column with the letter, or with the number of the choice, counted from 0."""
    letters: Annotated[str, Field(pattern=r"^[A-Z]{2,26}$")] = "ABCDEFGHIJ"
    """Letters of the choices in order."""


class JsonReward(RewardBase):
    """1 if the completion is JSON, alone or in a fenced block, that satisfies a JSON Schema, otherwise 0."""

    kind: Literal["json"]
    """Selects the check of JSON."""
    json_schema: dict[str, Any] | None = None
    """The schema of every row. Default: the row's `column`, otherwise every JSON is accepted."""
    column: str | None = None
    """Column with the row's schema, as a mapping or as JSON text."""
    timeout_s: Seconds = 10.0
    """Timeout per completion in seconds, because a pattern in a schema may backtrack for ever."""

    @model_validator(mode="after")
    def _one_schema(self) -> JsonReward:
        if self.json_schema is not None and self.column is not None:
            raise ValueError("json_schema and column both give a schema; remove one of them")
        return self


class OverlapReward(RewardBase):
    """Overlap with the row's reference text, from 0 to 1."""

    kind: Literal["overlap"]
    """Selects the overlap with a text."""
    measure: Literal["rouge_l", "bleu", "chrf"]
    """rouge_l: ROUGE-L by rouge-score. bleu, chrf: of one sentence by sacrebleu."""
    column: str = "reference"
    """Column with the reference text, or with a list of texts."""


class ExactReward(RewardBase):
    """1 if the completion equals the row's text, ignoring white space at both ends, otherwise 0."""

    kind: Literal["exact"]
    """Selects the comparison of whole texts."""
    column: str = "answer"
    """Column with the expected text, or with a list of accepted texts."""
    ignore_case: bool = False
    """Ignore case in the comparison."""


class RegexReward(RewardBase):
    """1 if a regular expression matches anywhere in the completion, otherwise 0."""

    kind: Literal["regex"]
    """Selects a regular expression."""
    pattern: str
    """Regular expression in Python's syntax. `(?s)`, `(?i)` and `(?m)` at its start set flags."""
    column: str | None = None
    """Column that the pattern's first group must equal. Default: only the match counts."""
    timeout_s: Annotated[Seconds, RUNTIME] = 10.0
    """Timeout per completion in seconds, because backtracking makes some patterns take exponential time."""

    @model_validator(mode="after")
    def _compiles(self) -> RegexReward:
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            problem = f"pattern '{self.pattern}' is not a valid regular expression ({error}); correct it"
            raise ValueError(problem) from None
        if self.column is not None and groups == 0:
            raise ValueError(
                f"pattern '{self.pattern}' has no group to compare with the column '{self.column}'; put the answer in "
                "parentheses"
            )
        return self


class FormatReward(RewardBase):
    """1 if the completion has the tagged sections in order, `<think>...</think>` and then an answer, otherwise 0."""

    kind: Literal["format"]
    """Selects the check of tagged sections."""
    sections: list[Annotated[str, Field(min_length=1)]] = Field(default=["think"], min_length=1)
    """Names of the tags in order. Each must be opened and closed once and contain text."""
    opened: bool = False
    """true: the prompt ends with the first opening tag, so the completion does not contain it."""
    text_after: Literal["required", "forbidden"] = "required"
    """required: text must follow the last section. forbidden: no text may follow it."""


class LengthReward(RewardBase):
    """1 if the completion has `min_tokens` to `max_tokens` tokens. Outside that range the score falls
    linearly to 0, which it reaches at `buffer` + 1 tokens."""

    kind: Literal["length"]
    """Selects the check of the length."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Smallest length with score 1, in tokens, including the end-of-sequence token."""
    max_tokens: Positive
    """Largest length with score 1, in tokens, including the end-of-sequence token."""
    buffer: Annotated[int, Field(ge=0)] = 0
    """Largest distance from the range, in tokens, with a score above 0. 0: every length outside the range scores 0."""

    @model_validator(mode="after")
    def _in_order(self) -> LengthReward:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}; lower min_tokens")
        return self


class InstructionsReward(RewardBase):
    """1 if the completion follows the row's verifiable instructions (IFEval), otherwise 0."""

    kind: Literal["ifeval"]
    """Selects the check of verifiable instructions."""
    column: str = "instruction_id_list"
    """Column with the list of the instructions' types, for example `[punctuation:no_comma]`."""
    arguments: str = "kwargs"
    """Column with the list of each instruction's arguments."""
    reading: Literal["strict", "loose"] = "strict"
    """strict: check the completion as it is. loose: an instruction is also followed if the completion follows it
    without its first line, its last line or its asterisks."""
    score: Literal["all", "share"] = "all"
    """all: 1 if every instruction is followed, otherwise 0. share: share of the instructions that are followed."""


class CodeReward(RewardBase):
    """1 if the program in the completion passes the row's tests, otherwise 0. Programs run in a sandbox."""

    kind: Literal["code"]
    """Selects the run of programs."""
    column: str = "test"
    """Column with the tests: HumanEval's `check` function, assert statements (MBPP's `test_list`), or inputs and
    outputs of a whole program."""
    entry_point: str = "entry_point"
    """Column with the name of the function under test. HumanEval's form needs it."""
    prefix: str = "prompt"
    """Column with the beginning of the program. It is used if it defines the function under test."""
    score: Literal["all", "share"] = "all"
    """all: 1 if every test passes, otherwise 0. share: share of the tests that pass."""
    timeout_s: Seconds = 20.0
    """Timeout of a run in seconds; then it is killed. Programs that calculate are stopped earlier, by `cpu_s`."""
    cpu_s: Annotated[int, Field(ge=1, le=3600)] = 5
    """Limit on a program's processor time in seconds."""
    memory_mb: Annotated[int, Field(ge=64, le=1 << 20)] = 512
    """Limit on a program's memory in MiB."""
    workers: Annotated[Positive | None, RUNTIME] = None
    """Number of programs that run at a time. Default: one per core."""
    unsafe: bool = False
    """true: run programs with this user's rights on machines without a sandbox; the limits stay."""


Reward = Annotated[
    ModelReward
    | RemoteReward
    | FunctionReward
    | MathReward
    | ExactReward
    | RegexReward
    | FormatReward
    | LengthReward
    | ChoiceReward
    | JsonReward
    | OverlapReward
    | InstructionsReward
    | CodeReward,
    Field(discriminator="kind"),
]


def _named_apart(rewards: list[Reward]) -> list[Reward]:
    labels = [reward.label for reward in rewards]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{labels.count(label)} rewards are called '{label}'; set a different `name` for each")
    return rewards


Rewards = Annotated[list[Reward], Field(min_length=1), AfterValidator(_named_apart)]
