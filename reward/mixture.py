"""Scores of a round's completions: the weighted sum of a stage's rewards, whatever they are.

Shapes: B completions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.config import rewards as config
from align.data import PromptRow
from align.data.chat import tokenizer_fingerprint
from align.data.experience import Experience
from align.errors import UserError
from align.reward import verifiers
from align.reward.functions import BUILT_IN, find_reward_function
from align.reward.model import ModelScorer
from align.reward.moments import Moments
from align.reward.process import FunctionProcess, Scored, UserFunction
from align.reward.remote import RewardClient
from align.rollout.base import Completion

Metrics = dict[str, float]


@dataclass(frozen=True)
class Round:
    """What rewards look at. Texts are decoded once, and only if a reward asks for them."""

    batch: Experience
    prompt_rows: Sequence[PromptRow]
    completions: Sequence[Completion]
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.completions)

    @cached_property
    def texts(self) -> list[str]:
        return [str(self.tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in self.completions]

    @cached_property
    def prompts(self) -> list[str]:
        """Each prompt's last turn."""
        return [row.messages[-1]["content"] for row in self.prompt_rows]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The data's columns, and `reference` where the row has one under another name."""
        return [columns(row) for row in self.prompt_rows]

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]


def columns(row: PromptRow) -> dict[str, Any]:
    """What a row holds for a reward; None in a column that its source lacks."""
    has_another = row.reference is not None and row.row.get("reference") is None
    return row.row | {"reference": row.reference} if has_another else row.row


def require_columns(rewards: Sequence[config.Reward], prompts: Sequence[PromptRow]) -> None:
    """Raises UserError where a reward compares with a column that is empty in a row."""
    for reward in rewards:
        name = getattr(reward, "column", None)
        for row in prompts if name is not None else ():
            found = {key for key, value in columns(row).items() if value is not None}
            if name not in found:
                raise UserError(
                    f"reward '{reward.label}': a row has nothing in the column '{name}', but only in "
                    f"{', '.join(sorted(found))}; correct the reward's `column`, or rename with the source's `columns`."
                )


Component = Callable[[Round], Scored]


class Scorer:
    """The rewards of a stage, loaded once.

    prompts: all that will be asked. tokenizer: the policy's. load_models: the reward models by their `init_from`.
    announce: is told a model's name and the rows that it is about to be asked for, so that other processes which hold
    a part of it do the same. gather: where completions are spread over processes, gives the moments of all of them
    for one's own, so that all normalise alike. Raises UserError for what can be seen to be wrong now: columns, files,
    checkpoints, servers.
    """

    def __init__(
        self,
        rewards: Sequence[config.Reward],
        prompts: Sequence[PromptRow],
        tokenizer: PreTrainedTokenizerBase,
        *,
        load_models: Callable[[], Mapping[str, ModelScorer]],
        announce: Callable[[str, Experience], None] = lambda name, batch: None,
        say: Callable[[str], None] = print,
        gather: Callable[[Moments], Sequence[Moments]] = lambda moments: [moments],
    ):
        require_columns(rewards, prompts)
        self.rewards, self.tokenizer = rewards, tokenizer
        self.announce, self.say, self.gather = announce, say, gather
        self.moments = {reward.label: Moments() for reward in rewards if reward.normalise == "running"}
        self.process = FunctionProcess()
        # Models last: what is wrong with a function is known in a second, and they may take minutes to load.
        self.components = {r.label: self._component(r) for r in rewards if not isinstance(r, config.ModelReward)}
        models = load_models()
        self.components |= {
            r.label: self._model(r, models[r.init_from]) for r in rewards if isinstance(r, config.ModelReward)
        }

    @torch.no_grad()
    def score(
        self, batch: Experience, rows: Sequence[PromptRow], completions: Sequence[Completion]
    ) -> tuple[Tensor, Metrics]:
        """(scores [B], metrics of each reward). Raises UserError with the reward and the completion at fault."""
        asked = Round(batch, rows, completions, self.tokenizer)
        total = torch.zeros(len(asked))
        metrics: Metrics = {}
        for reward in self.rewards:
            start = time.perf_counter()
            scored = self.components[reward.label](asked)
            seconds = time.perf_counter() - start
            missing = [score is None for score in scored.scores]
            self._report_missing(reward, scored, missing)
            substitute = getattr(reward, "failure_score", None) or 0.0
            values = [substitute if score is None else score for score in scored.scores]
            metrics |= describe(reward.label, values, sum(missing), seconds)
            total += reward.weight * torch.tensor(self._scaled(reward, values))
        _require_finite("the sum of all rewards", total.tolist(), asked, "lower the weights")  # float32 ends at 3e38
        return total, metrics

    def state_dict(self) -> dict[str, Any]:
        """What the next rounds need to know of the earlier ones; plain JSON."""
        return {name: [m.count, m.mean, m.squares] for name, m in self.moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments |= {name: Moments(*state[name]) for name in self.moments if name in state}

    def close(self) -> None:
        """End the process of users' functions."""
        self.process.close()

    def _scaled(self, reward: config.RewardBase, values: list[float]) -> list[float]:
        if reward.normalise == "running":
            moments = self.moments[reward.label]
            for part in self.gather(Moments.of(values)):
                moments = moments.merged(part)
            self.moments[reward.label] = moments
            values = [moments.normalised(value) for value in values]
        limit = float("inf") if reward.clip is None else reward.clip
        return [min(max(value, -limit), limit) for value in values]

    def _report_missing(self, reward: config.RewardBase, scored: Scored, missing: list[bool]) -> None:
        if not scored.problem or not any(missing):
            return
        if all(missing):
            raise UserError(
                f"reward '{reward.label}': none of {len(missing)} completions could be scored (the last one: "
                f"{scored.problem}); mend that, or leave the reward out."
            )
        self.say(f"  reward '{reward.label}': {sum(missing)} of {len(missing)} completions failed ({scored.problem})")

    # --- one reward of each kind ------------------------------------------------------------------------------

    def _component(self, reward: config.RewardBase) -> Component:
        match reward:
            case config.RemoteReward():
                return self._remote(reward)
            case config.FunctionReward():
                return self._function(reward)
            case config.RegexReward():
                return self._regex(reward)
            case config.MathReward():
                return lambda asked: Scored(
                    [
                        verifiers.math_score(text, answer, reward.format)
                        for text, answer in zip(asked.texts, asked.column(reward.column), strict=True)
                    ]
                )
            case config.ExactReward():
                return lambda asked: Scored(
                    [
                        verifiers.exact_score(text, answer, ignore_case=reward.ignore_case)
                        for text, answer in zip(asked.texts, asked.column(reward.column), strict=True)
                    ]
                )
            case config.FormatReward():
                return lambda asked: Scored(
                    [
                        verifiers.format_score(
                            text, reward.sections, opened=reward.opened, text_after=reward.text_after
                        )
                        for text in asked.texts
                    ]
                )
            case config.LengthReward():
                limits = reward.model_dump(include={"min_tokens", "max_tokens", "buffer"})
                return lambda asked: Scored(
                    [verifiers.length_score(len(c.token_ids), **limits) for c in asked.completions]
                )
        raise TypeError(f"no component for {reward!r}")

    def _model(self, reward: config.ModelReward, scorer: ModelScorer) -> Component:
        same = tokenizer_fingerprint(scorer.tokenizer) == tokenizer_fingerprint(self.tokenizer)
        if not same:
            self.say(f"  reward '{reward.label}': another tokenizer or chat template; completions are encoded again")

        def component(asked: Round) -> Scored:
            batch = replace(asked.batch, routed_experts=None)  # of the policy
            if not same:
                texts = zip(asked.prompt_rows, asked.texts, asked.completions, strict=True)
                ids = [scorer.encode(row.messages, text, c.finished) for row, text, c in texts]
                batch = scorer.pad([prompt for prompt, _ in ids], [completion for _, completion in ids])
            scorer.require_room(batch)
            self.announce(reward.init_from, batch)
            scores = scorer.scores(batch).tolist()
            _require_finite(f"reward model '{reward.label}'", scores, asked, "take an earlier checkpoint")
            return Scored(scores)

        return component

    def _remote(self, reward: config.RemoteReward) -> Component:
        client = RewardClient(reward.url, timeout_s=reward.timeout_s, retries=reward.retries)
        same = client.health().get("tokenizer") == tokenizer_fingerprint(self.tokenizer)

        def component(asked: Round) -> Scored:
            everything: dict[str, list] = {"finished": [c.finished for c in asked.completions]}
            if same:  # never decode and encode again what has token ids
                everything["prompts"] = [c.prompt_ids for c in asked.completions]
                everything["completions"] = [c.token_ids for c in asked.completions]
            else:
                everything["prompts"] = [row.messages for row in asked.prompt_rows]
                everything["completions"] = asked.texts
            if reward.send_rows:
                everything["rows"] = asked.rows
            scores: list[float | None] = []
            for start in range(0, len(asked), reward.batch_size):
                part = slice(start, start + reward.batch_size)
                scores += client.score({name: values[part] for name, values in everything.items()})
            if reward.failure_score is None:
                mend = "mend the server, or give the reward a failure_score"
                _require_finite(f"reward server {reward.url}", scores, asked, mend)
            return Scored(scores, "the server sent no finite number")

        return component

    def _function(self, reward: config.FunctionReward) -> Component:
        if reward.path in BUILT_IN:
            built_in = BUILT_IN[reward.path]
            return lambda asked: Scored(list(built_in(asked.prompts, asked.texts, asked.rows)))
        file, name = find_reward_function(reward.path)
        function = UserFunction(
            label=reward.label,
            file=file,
            name=name,
            batched=reward.batched,
            timeout_s=reward.timeout_s,
            tolerant=reward.failure_score is not None,
        )
        self.process.load(function)
        return lambda asked: self.process.score(function, asked.prompts, asked.texts, asked.rows)

    def _regex(self, reward: config.RegexReward) -> Component:
        # A pattern is a user's program too: some backtrack for ever.
        function = UserFunction(
            reward.label, verifiers.__file__, "regex_row", batched=False, timeout_s=reward.timeout_s
        )

        def component(asked: Round) -> Scored:
            expected = [None] * len(asked) if reward.column is None else asked.column(reward.column)
            rows = [{"pattern": reward.pattern, "expected": value} for value in expected]
            return self.process.score(function, asked.prompts, asked.texts, rows)

        return component


def describe(label: str, values: Sequence[float], missing: int, seconds: float) -> Metrics:
    """A reward's own figures of a round, before it is normalised, clipped and weighted."""
    moments = Moments.of(values)
    return {
        f"reward/{label}": moments.mean,
        f"reward/{label}/std": moments.std,
        f"reward/{label}/min": min(values),
        f"reward/{label}/max": max(values),
        f"reward/{label}/failures": missing / len(values),
        f"time/reward/{label}": round(seconds, 3),
    }


def _require_finite(source: str, scores: Sequence[float | None], asked: Round, mend: str) -> None:
    for index, score in enumerate(scores):
        if score is None or not math.isfinite(score):
            raise UserError(f"{source}: no finite score for completion {index} ({asked.texts[index][:60]!r}); {mend}.")
