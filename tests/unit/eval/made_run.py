"""A small hand-made run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ATTACK = "<script>alert('x')</script> <img src=x onerror=alert(1)> ``` | \x00"
STAGES = {"sft": "sft", "rm": "reward_model", "dpo": "dpo", "ppo": "ppo", "evaluate": "evaluate"}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_stage(run: Path, name: str, kind: str, rows: list[dict]) -> None:
    manifest = {
        "stage": name,
        "kind": kind,
        "status": "finished",
        "seconds": 30.0,
        "finished": "2026-01-01T00:00:30+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "config_hash": "cafe" * 8,
        "parents": {"init_from": "base"},
        "seed": 1,
        "data": {"train": {"rows": 90, "dropped": {"too_long": 7}, "truncated": 0}},
        "packages": {"numpy": "2.0"},
        "hardware": {"cpu": "two cores", "cores": 2, "accelerator": None},
        "metrics": {"loss": 0.125, "broken": float("nan")},
        "parameters": {"total": 1000, "active": 500, "trainable": 10},
    }
    write_json(run / name / "manifest.json", manifest)
    (run / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path) -> Path:
    """A run of five stages with curves, an evaluation with a task, and broken values; returns its folder."""
    recipe = {
        "name": "a <b>run</b>",
        "seed": 1,
        "stages": {name: {"kind": kind} for name, kind in STAGES.items()},
    }
    write_json(folder / "recipe.json", recipe)
    steps = range(1, 81)
    write_stage(
        folder,
        "sft",
        "sft",
        [{"step": s, "loss": 2 / s, "unknown": "text", "eval_loss": None} for s in steps],
    )
    write_stage(folder, "rm", "reward_model", [{"step": s, "accuracy": 0.8} for s in steps])
    write_stage(folder, "dpo", "dpo", [{"step": s, "rewards/margins": s / 9, "loss": 0.6} for s in steps])
    times = {"time/generate": 2.0, "time/score": 0.5, "time/update": 1.0, "time/reward/rm": 0.4}
    ppo = [{"step": s, "score_mean": s / 9, "score_std": 1.0, "kl": 0.1, **times} for s in steps]
    write_stage(folder, "ppo", "ppo", ppo)
    write_stage(folder, "evaluate", "evaluate", [])
    models = {
        "base": {"scores": [0.0, 1.0, 2.0, 3.0], "f1": [0.1, 0.2, 0.3, 0.4]},
        "sft": {"scores": [1.0, 2.0, 3.0, 4.0], "f1": [0.4, 0.3, 0.2, 0.1]},
        "ppo": {
            "kl": [1.0, math.nan, 2.0, 3.0],
            "scores": [0.0, 1.5, 2.5, None],
            "preference": {"accuracy": 0.75, "n": 40},
            "eos": [True] * 4,
        },
    }
    prompts = [{"prompt": "why?", "reference": "because", "completions": {"base": ATTACK, "sft": "", "ppo": "so"}}]
    results = {"models": models, "baseline": "base", "prompts": prompts}
    results["reward_model_accuracy"] = {"accuracy": 0.9, "n": 30}
    results["reference"] = "sft"
    results["tasks"] = {"sums": task({"base": [0.0, 0.0, 1.0, 0.0], "ppo": [1.0, 0.0, 1.0, None]})}
    write_json(folder / "evaluate" / "results.json", results)
    return folder


def task(values: dict[str, list[float | None]]) -> dict[str, Any]:
    """A task with one metric `math`, as results.json holds it."""

    def result(scores: list[float | None]) -> dict[str, Any]:
        known = [score for score in scores if score is not None]
        math_metric = {
            "values": scores,
            "mean": sum(known) / len(known),
            "standard_error": 0.25,
            "n": len(known),
            "unscored": len(scores) - len(known),
            "not_finite": 0,
            "unanswered": 1,
        }
        return {"n": len(scores), "truncated": 2, "mean_length": 17.5, "metrics": {"math": math_metric}}

    models = {name: result(scores) for name, scores in values.items()}
    prompts = [{"prompt": f"{n} + 1?", "reference": None, "completions": dict.fromkeys(values, "5")} for n in range(4)]
    return {"temperature": 0.0, "max_new_tokens": 256, "models": models, "prompts": prompts}
