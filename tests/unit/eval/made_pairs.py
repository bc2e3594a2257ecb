"""Hand-made output of `align eval --pairs`, without models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from align.eval.reward_model.pairs import ScoredPair
from align.eval.reward_model.recorded import RESULTS, write_scores
from tests.unit.eval.made_run import write_json


def write_pairs_evaluation(out: Path, models: Mapping[str, Sequence[tuple[str, ScoredPair]]], *, seed: int = 0) -> Path:
    """Write the folder of an evaluation. models: by name, (name of the pair, its scores) of each row."""
    for name, pairs in models.items():
        write_scores(out / name, [(row, pair, scored) for row, (pair, scored) in enumerate(pairs)])
    checkpoints = {name: {"checkpoint": f"runs/{name}"} for name in models}
    write_json(out / RESULTS, {"source": "pairs.jsonl", "settings": {"seed": seed}, "models": checkpoints})
    return out
