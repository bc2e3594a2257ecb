"""OUT/MODEL/pairs.jsonl of `align eval --pairs`: the scores of each pair, and which pair they belong to."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.eval.reward_model.pairs import ScoredPair
from align.run.folder import read_jsonl, write_text

PAIRS = "pairs.jsonl"
"""The scores of a model, in its folder."""
RESULTS = "pairs.json"
"""The statistics of all models, in the folder of the evaluation."""


def digest(value: Any) -> str:
    """Identifies a JSON value, such as the messages of a prompt."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def pair_digest(sides: Sequence[tuple[list[dict[str, Any]], str]]) -> str:
    """`digest` of a pair: (messages before the answer, answer) of the chosen and the rejected completion."""
    return digest([[messages, answer] for messages, answer in sides])


def write_scores(folder: Path, pairs: Iterable[tuple[int, str, ScoredPair]]) -> None:
    """Write a model's pairs.jsonl. pairs: (number of the row in the source, `digest` of the pair, its scores)."""
    rows = [
        {
            "row": row,
            "pair": pair,
            "prompt": None if scored.prompt is None else digest(scored.prompt),
            "chosen": scored.chosen,
            "rejected": scored.rejected,
            "subset": scored.subset,
            "chosen_length": scored.chosen_length,
            "rejected_length": scored.rejected_length,
            "chosen_first": scored.chosen_first,
        }
        for row, pair, scored in pairs
    ]
    write_text(folder / PAIRS, "".join(json.dumps(row) + "\n" for row in rows))


def read_scores(folder: Path) -> dict[str, ScoredPair]:
    """A model's scores by pair. The name of a pair depends on its text alone; equal pairs are numbered.

    Raises `UserError` if the file does not identify the pairs.
    """
    found: dict[str, ScoredPair] = {}
    seen: Counter[str] = Counter()
    for row in read_jsonl(folder / PAIRS):
        try:
            pair = str(row["pair"])
            scored = ScoredPair(
                row["chosen"],
                row["rejected"],
                row["chosen_length"],
                row["rejected_length"],
                row["subset"],
                row["chosen_first"],
                row["prompt"],
            )
        except KeyError as error:
            raise UserError(
                f"{folder / PAIRS}: a row has no {error.args[0]!r}, so its pair is not known. Run `align eval --pairs` "
                "again."
            ) from None
        found[f"{pair} {seen[pair]}"] = scored
        seen[pair] += 1
    return found
