"""Score the preference pairs of a file with reward models, and write the results.

OUT/pairs.json          statistics of each model, and of each two models
OUT/pairs.md            the same as sentences
OUT/pairs.html          the same as one page, with the pairs that each model ranks most wrongly
OUT/MODEL/pairs.jsonl   scores and lengths of each pair, which `align compare` reads
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from align.config.parts import FileSource
from align.data import shapes
from align.data.rows import Row, Unreadable
from align.data.shapes import DropRow
from align.data.sources import source_chunks
from align.data.template_defaults import set_template_defaults
from align.errors import UserError
from align.eval.answering import choose
from align.eval.reward_model.page import Wrong, render_pairs
from align.eval.reward_model.pairs import (
    ScoredPair,
    accuracy,
    by_subset,
    calibration,
    length_bias,
    model_agreement,
    position_bias,
    subset_mean,
)
from align.eval.reward_model.recorded import RESULTS, pair_digest, write_scores
from align.eval.reward_model.report import agreement_lines, pair_lines
from align.reward.model import ModelScorer
from align.run.folder import locked, write_json, write_text

SEQUENCES_AT_A_TIME = 256
PAGE = "pairs.html"
WRONG_PAIRS = 10
"""Pairs of each model that the page shows in full."""
CHOSEN_FIRST = "chosen_first"
"""Column that is true if the chosen completion was shown first to the people who labelled the pairs."""


@dataclass(frozen=True)
class Preference:
    """One pair of a file.

    row: number of its row. sides: (messages before the answer, answer) of the chosen and the rejected completion.
    variables: for the chat template. subset, chosen_first: see `ScoredPair`.
    """

    row: int
    sides: tuple[tuple[list[dict[str, Any]], str], tuple[list[dict[str, Any]], str]]
    variables: Mapping[str, Any]
    subset: str
    chosen_first: bool | None


def read_preferences(
    source: FileSource, *, subset: str | None = None, limit: int | None = None, seed: int = 0
) -> tuple[list[Preference], dict[str, int]]:
    """(pairs, {why rows were dropped: their number}).

    subset: column whose values name subsets. limit: number of pairs, drawn with the seed.
    Raises UserError if the source has no pairs, or no row has the column.
    """
    found, dropped = [], Counter[str]()
    number = 0
    for chunk in source_chunks(source, accepted=("preference",)):
        for row in chunk.rows():
            try:
                found.append(_preference(number, row, subset))
            except DropRow as reason:
                dropped[str(reason)] += 1
            number += 1
    if not found:
        raise UserError(f"--pairs {source.path}: none of {number} rows is a usable pair. Correct the file.")
    if subset is not None and not any(pair.subset for pair in found):
        raise UserError(f"--pairs {source.path}: no row has the column '{subset}'. Correct --subset.")
    chosen = set(choose([str(pair.row) for pair in found], limit, "pairs", seed))
    return [pair for pair in found if str(pair.row) in chosen], dict(dropped)


def _preference(number: int, row: Row, subset: str | None) -> Preference:
    pair = shapes.pair(row)
    sides = []
    for side in (pair["chosen"], pair["rejected"]):
        text = side[-1].get("content")
        if not isinstance(text, str) or not text:
            raise DropRow("an answer has no text")
        sides.append(([*pair["prompt"], *side[:-1]], text))
    name, first = row.get(subset or ""), row.get(CHOSEN_FIRST)
    return Preference(
        number,
        (sides[0], sides[1]),
        shapes.template_variables(row),
        "" if name is None or isinstance(name, Unreadable) else str(name),
        first if isinstance(first, bool) else None,
    )


def score_answers(scorer: ModelScorer, encoded: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
    """Score of each (prompt, answer) of token ids; None for one that is longer than the model's context."""
    scores: list[float | None] = [None] * len(encoded)
    fitting = [i for i, (prompt, answer) in enumerate(encoded) if len(prompt) + len(answer) <= scorer.max_length]
    fitting.sort(key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    for start in range(0, len(fitting), SEQUENCES_AT_A_TIME):
        part = fitting[start : start + SEQUENCES_AT_A_TIME]
        batch = scorer.pad([encoded[i][0] for i in part], [encoded[i][1] for i in part])
        for i, score in zip(part, scorer.scores(batch).tolist(), strict=True):
            scores[i] = score
    return scores


def score_preferences(scorer: ModelScorer, preferences: Sequence[Preference]) -> list[ScoredPair]:
    """The pairs with a model's scores; None for a completion that is longer than the model's context."""
    encoded = [
        scorer.encode(list(messages), text, True, pair.variables)
        for pair in preferences
        for messages, text in pair.sides
    ]
    scores = score_answers(scorer, encoded)
    return [
        ScoredPair(
            scores[2 * i],
            scores[2 * i + 1],
            len(encoded[2 * i][1]),
            len(encoded[2 * i + 1][1]),
            pair.subset,
            pair.chosen_first,
            json.dumps(pair.sides[0][0], ensure_ascii=False, default=str),
        )
        for i, pair in enumerate(preferences)
    ]


def evaluate_pairs(
    models: Mapping[str, Path],
    source: FileSource,
    *,
    out: Path,
    dtype: str,
    subset: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    micro_batch_tokens: int = 8192,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    status: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Score the pairs of a file with each reward model and write the results to `out`; returns pairs.json's content.

    chat_template_kwargs: values for the chat template's own variables; those of a row take precedence.
    """
    preferences, dropped = read_preferences(source, subset=subset, limit=limit, seed=seed)
    scored: dict[str, list[ScoredPair]] = {}
    lines = [f"{len(preferences)} pairs of {source.path}"]
    lines += [f"  {count} rows dropped: {reason}" for reason, count in dropped.items()]
    with locked(out):
        for name, folder in models.items():
            status(f"{name}: scoring {len(preferences)} pairs")
            scorer = ModelScorer(folder, dtype, micro_batch_tokens)
            set_template_defaults(scorer.tokenizer, chat_template_kwargs or {}, "--chat-template-kwargs")
            scored[name] = score_preferences(scorer, preferences)
            pairs = zip(preferences, scored[name], strict=True)
            write_scores(out / name, ((pair.row, pair_digest(pair.sides), scores) for pair, scores in pairs))
            lines += pair_lines(name, scored[name])
        agreements = {}
        for first, second in combinations(scored, 2):
            lines += agreement_lines(first, second, scored[first], scored[second])
            agreements[f"{first} {second}"] = _plain(model_agreement(scored[first], scored[second]))
        content = {
            "source": source.path,
            "pairs": len(preferences),
            "dropped": dropped,
            "settings": {
                "dtype": dtype,
                "subset": subset,
                "limit": limit,
                "seed": seed,
                "chat_template_kwargs": dict(chat_template_kwargs or {}),
            },
            "models": {name: {"checkpoint": str(models[name])} | statistics(pairs) for name, pairs in scored.items()},
            "agreement": agreements,
            "lines": lines,
        }
        write_json(out / RESULTS, content)
        write_text(out / "pairs.md", "\n".join(["# Reward models on preference pairs", "", "```", *lines, "```", ""]))
        wrong = {name: ranked_wrongly(preferences, pairs, WRONG_PAIRS) for name, pairs in scored.items()}
        write_text(out / PAGE, render_pairs(content, wrong))
    return content


def ranked_wrongly(preferences: Sequence[Preference], scored: Sequence[ScoredPair], limit: int) -> list[Wrong]:
    """The pairs whose rejected completion has the higher score, the largest margins first."""
    margins = [(pair.margin or 0.0, number) for number, pair in enumerate(scored)]
    found = []
    for margin, number in sorted(pair for pair in margins if pair[0] < 0)[:limit]:
        pair = preferences[number]
        (prompt, chosen), (_, rejected) = pair.sides
        found.append(Wrong(pair.row, margin, prompt, chosen, rejected))
    return found


def statistics(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy, biases and calibration of one model, as pairs.json has them."""
    return {
        "accuracy": accuracy(pairs)._asdict(),
        "subsets": {name: found._asdict() for name, found in by_subset(pairs).items()},
        "subset_mean": subset_mean(pairs),
        "length_bias": _plain(length_bias(pairs)),
        "position_bias": _plain(position_bias(pairs)),
        "calibration": _plain(calibration(pairs)),
    }


def _plain(value: Any) -> Any:
    """Named tuples as dictionaries, at any depth."""
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
