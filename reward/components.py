"""Rewards other than reward models: build a function that scores sampled completions from each kind of reward section.

An evaluation uses these components as its metrics. They need prompts and completions, but no rollout batch:

    with FunctionProcess() as process:
        component = build_component(reward, process, tokenizer)
        scores = component(Samples(prompt_rows, completions, tokenizer)).scores
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from align.config import rewards as config
from align.data.answers import AnswerReader
from align.data.chat import tokenizer_fingerprint
from align.data.prepare import PromptRow
from align.errors import UserError
from align.reward.code import build_sandbox, read_tests, score_all
from align.reward.functions import BUILT_IN, REFERENCE, find_reward_function
from align.reward.instructions import check_arguments, read_instructions, undecided, verdicts
from align.reward.json_schema import check_schema
from align.reward.overlap import require_library
from align.reward.process import FunctionProcess, Scored, UserFunction
from align.reward.remote import RewardClient
from align.reward.symbolic import require_math_verify
from align.reward.text import Row, is_missing
from align.reward.verifiers import VERIFIERS, Sample
from align.rollout.base import Completion


@dataclass(frozen=True)
class Samples:
    """Completions to score. Texts are decoded once, on first use.

    prompt_rows: prompt and data row of each completion.
    completions: token ids as sampled.
    tokenizer: the policy's; None if `decoded` is given.
    decoded: texts of the completions if they are known.
    """

    prompt_rows: Sequence[PromptRow]
    completions: Sequence[Completion]
    tokenizer: PreTrainedTokenizerBase | None
    decoded: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.completions)

    @cached_property
    def texts(self) -> list[str]:
        """Content of each completion; see `AnswerReader.text`."""
        if self.decoded is not None:
            return list(self.decoded)
        assert self.tokenizer is not None
        reader = AnswerReader(self.tokenizer)
        return [reader.text(c.token_ids) for c in self.completions]

    @cached_property
    def prompts(self) -> list[str]:
        """Text of each prompt's last turn."""
        return [row.messages[-1]["content"] for row in self.prompt_rows]

    @cached_property
    def rows(self) -> list[Row]:
        """Data columns of each prompt."""
        return [columns(row) for row in self.prompt_rows]


class Component(Protocol):
    """Scores completions by one reward."""

    def __call__(self, samples: Samples) -> Scored: ...


def build_component(
    reward: config.RewardBase, process: FunctionProcess, tokenizer: PreTrainedTokenizerBase | None
) -> Component:
    """The component of a reward section of any kind except `model`.

    process: runs users' functions and patterns; the caller closes it. tokenizer: the policy's; only `remote` needs it.
    Raises UserError if the function cannot be imported, the server cannot be reached, or there is no sandbox.
    """
    match reward:
        case config.RemoteReward():
            assert tokenizer is not None
            return _remote(reward, tokenizer)
        case config.FunctionReward():
            return _function(reward, process)
        case config.RegexReward():
            return _regex(reward, process)
        case config.CodeReward():
            return _code(reward)
        case config.JsonReward():
            return _json(reward, process)
        case config.MathReward(symbolic=True):
            return _symbolic(reward, process)
        case config.InstructionsReward():
            return _instructions(reward)
        case config.OverlapReward():
            require_library(reward.measure)
    return _verifier(reward)


# --- data columns --------------------------------------------------------------------------------------------


def columns(row: PromptRow) -> Row:
    """Columns of a prompt's data row, plus `reference` if the row has a reference answer in another column."""
    has_another = row.reference is not None and row.row.get(REFERENCE) is None
    return row.row | {REFERENCE: row.reference} if has_another else row.row


def compared_column(reward: config.RewardBase) -> str | None:
    """Name of the data column that a reward compares completions with, if any."""
    if isinstance(reward, config.FunctionReward):
        return REFERENCE if reward.path == "reference_f1" else None
    return getattr(reward, "column", None)


def has_column(reward: config.RewardBase, row: PromptRow) -> bool:
    """True if the row has a value in the column that the reward compares with, or if the reward needs no column."""
    name = compared_column(reward)
    return name is None or not is_missing(columns(row).get(name))


def require_columns(rewards: Sequence[config.RewardBase], prompts: Sequence[PromptRow]) -> None:
    """Raise UserError if a reward compares with a column that is empty in a row, or cannot use what is in it."""
    for reward in rewards:
        for row in prompts:
            if not has_column(reward, row):
                found = {key for key, value in columns(row).items() if not is_missing(value)}
                raise UserError(
                    f"reward '{reward.label}': a row has no value in the column '{compared_column(reward)}', only in "
                    f"{', '.join(sorted(found))}. Set the reward's `column` to one of these, or rename a column with "
                    "the source's `columns`."
                )
            if isinstance(reward, config.CodeReward):
                read_tests(reward, columns(row))
            if isinstance(reward, config.InstructionsReward):
                for instruction in read_instructions(columns(row), reward.column, reward.arguments):
                    check_arguments(instruction)


def require_finite_scores(source: str, scores: Sequence[float | None], samples: Samples, fix: str) -> None:
    """Raise UserError with the first completion that has no finite score."""
    for index, score in enumerate(scores):
        if score is None or not math.isfinite(score):
            text = samples.texts[index][:60]
            raise UserError(f"{source}: no finite score for completion {index} ({text!r}). {fix}.")


# --- one component for each kind -----------------------------------------------------------------------------


def _verifier(reward: config.RewardBase) -> Component:
    verify = VERIFIERS[type(reward)]

    def component(samples: Samples) -> Scored:
        rows = zip(samples.texts, samples.rows, samples.completions, strict=True)
        return Scored([verify(reward, Sample(text, row, len(c.token_ids))) for text, row, c in rows])

    return component


def _regex(reward: config.RegexReward, process: FunctionProcess) -> Component:
    """Search in the process of users' functions, which has a time limit: some patterns backtrack for ever."""
    function = UserFunction(reward.label, "", "regex_row", batched=False, timeout_s=reward.timeout_s)
    process.load(function)

    def component(samples: Samples) -> Scored:
        expected = [None if reward.column is None else row[reward.column] for row in samples.rows]
        rows = [{"pattern": reward.pattern, "expected": value} for value in expected]
        return process.score(function, samples.prompts, samples.texts, rows)

    return component


def _json(reward: config.JsonReward, process: FunctionProcess) -> Component:
    if reward.json_schema is not None:
        check_schema(reward.json_schema)
    function = UserFunction(reward.label, "", "json_row", batched=False, timeout_s=reward.timeout_s, tolerant=True)
    process.load(function)

    def component(samples: Samples) -> Scored:
        schemas = [reward.json_schema if reward.column is None else row[reward.column] for row in samples.rows]
        return process.score(function, samples.prompts, samples.texts, [{"schema": schema} for schema in schemas])

    return component


def _symbolic(reward: config.MathReward, process: FunctionProcess) -> Component:
    """Compare by algebra, in a process with a time limit, the answers that are not equal as numbers or text."""
    require_math_verify()
    function = UserFunction(reward.label, "", "symbolic_row", batched=False, timeout_s=reward.timeout_s, tolerant=True)
    process.load(function)
    plain = _verifier(reward)

    def component(samples: Samples) -> Scored:
        scores = plain(samples).scores
        places = [i for i, score in enumerate(scores) if score == 0.0]
        rows = [{"format": reward.format, "expected": samples.rows[i][reward.column]} for i in places]
        texts = [samples.texts[i] for i in places]
        found = process.score(function, [samples.prompts[i] for i in places], texts, rows) if places else Scored([])
        for place, score in zip(places, found.scores, strict=True):
            scores[place] = score
        return Scored(scores, found.problem)

    return component


def _instructions(reward: config.InstructionsReward) -> Component:
    score = _verifier(reward)

    def component(samples: Samples) -> Scored:
        scores = score(samples).scores
        index = next((i for i, value in enumerate(scores) if value is None), None)
        if index is None:
            return Scored(scores)
        instructions = read_instructions(samples.rows[index], reward.column, reward.arguments)
        return Scored(scores, undecided(verdicts(samples.texts[index], instructions)))

    return component


def _code(reward: config.CodeReward) -> Component:
    box = build_sandbox(reward)
    return lambda samples: score_all(reward, box, samples.texts, samples.rows)


def _function(reward: config.FunctionReward, process: FunctionProcess) -> Component:
    if reward.path in BUILT_IN:
        built_in = BUILT_IN[reward.path]
        return lambda samples: Scored(list(built_in(samples.prompts, samples.texts, samples.rows)))
    file, name = find_reward_function(reward.path)
    function = UserFunction(
        label=reward.label,
        file=file,
        name=name,
        batched=reward.batched,
        timeout_s=reward.timeout_s,
        tolerant=reward.failure_score is not None,
    )
    process.load(function)
    return lambda samples: process.score(function, samples.prompts, samples.texts, samples.rows)


def _remote(reward: config.RemoteReward, tokenizer: PreTrainedTokenizerBase) -> Component:
    client = RewardClient(reward.url, timeout_s=reward.timeout_s, retries=reward.retries)
    same_tokenizer = client.health().get("tokenizer") == tokenizer_fingerprint(tokenizer)

    def component(samples: Samples) -> Scored:
        request: dict[str, list[Any]] = {"finished": [c.finished for c in samples.completions]}
        if same_tokenizer:  # decoded and encoded again, a completion may have other token ids
            request["prompts"] = [c.prompt_ids for c in samples.completions]
            request["completions"] = [c.token_ids for c in samples.completions]
        else:
            request["prompts"] = [row.messages for row in samples.prompt_rows]
            request["completions"] = samples.texts
            variables = [dict(row.variables) for row in samples.prompt_rows]
            if any(variables):
                request["chat_template_kwargs"] = variables
        if reward.send_rows:
            request["rows"] = samples.rows
        scores: list[float | None] = []
        for start in range(0, len(samples), reward.batch_size):
            chunk = slice(start, start + reward.batch_size)
            scores += client.score({name: values[chunk] for name, values in request.items()})
        if reward.failure_score is None:
            fix = "Fix the server, or set the reward's failure_score"
            require_finite_scores(f"reward server {reward.url}", scores, samples, fix)
        return Scored(scores, "the server sent no finite number")

    return component
