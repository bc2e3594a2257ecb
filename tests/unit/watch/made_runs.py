"""Hand-made folders of running and finished runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def append(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def start(run: Path, stage: str = "sft", steps: int = 100) -> Path:
    """The folder of a stage that has begun; its run has an sft and a ppo stage."""
    recipe = {"name": run.name, "description": ATTACK, "stages": {"sft": {"kind": "sft"}, "ppo": {"kind": "ppo"}}}
    write(run / "recipe.json", recipe)
    write(run / stage / "config.json", {})
    write(run / stage / "steps.json", {"steps": steps})
    return run / stage


def training_row(step: int, of: int) -> dict[str, Any]:
    """A line of metrics.jsonl of an sft stage with a falling, rough loss."""
    return {
        "step": step,
        "loss": 2 * math.exp(-4 * step / of) + 0.2 * math.sin(step * 1.7),
        "grad_norm": 1 + math.sin(step) / 2,
        "learning_rate": 1e-4 * (1 - step / of),
        "expert_load_max": 1.4,
        "speed/train": 1000.0 + step % 7,
        "time/step": 0.5,
        "memory/peak_gib": 1.25,
        "router_entropy": 1.5,
        "mine": 3.0,
    }


def write_long(run: Path, steps: int) -> None:
    """An sft stage with `steps` steps of 1.2 times as many."""
    folder = start(run, steps=steps * 6 // 5)
    append(folder / "metrics.jsonl", *(training_row(step, steps) for step in range(1, steps + 1)))
    append(folder / "metrics.jsonl", {"step": steps, "eval_loss": 0.5})
    loads = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    append(folder / "experts.jsonl", *({"step": step, "load": loads} for step in range(10, steps + 1, steps // 100)))


def write_ppo(run: Path) -> None:
    """A finished sft stage, and a ppo stage with samples."""
    sft = start(run, steps=3)
    append(sft / "metrics.jsonl", *(training_row(step, 3) for step in (1, 2, 3)))
    write(sft / "manifest.json", {"status": "finished", "kind": "sft", "seconds": 12.5})
    ppo = start(run, "ppo", steps=10)
    times = {"time/generate": 2.0, "time/update": 1.0, "speed/rollout": 50.0}
    for step in (1, 2, 3):
        append(
            ppo / "metrics.jsonl", {"step": step, "score_mean": step / 2, "score_std": 0.5, "reward/own": 1.0} | times
        )
        sample = {"step": step, "prompt": ATTACK, "completion": f"{ATTACK} {step}", "score": 0.5, "finished": False}
        append(ppo / "samples.jsonl", sample)
