"""Evaluate any checkpoints that align loads, on your own prompts or on a built-in task.

    align run tiny
    python examples/evaluate_any_checkpoint.py runs/tiny/sft runs/tiny/ppo --prompts runs/tiny/pairs/data/held_out.jsonl
    python examples/evaluate_any_checkpoint.py runs/tiny/sft --task gsm8k  # needs the Hugging Face hub

Each prompt needs a reference answer: a column `reference`, or `chosen` in preference pairs. Decoding is greedy.
Results, completions and a report are written to --run-dir.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from align.config.recipe import Recipe
from align.errors import UserError
from align.pipeline import run


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate checkpoints on a task.")
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of stages, or folders with config.json")
    parser.add_argument("--task", help="a built-in task")
    parser.add_argument("--prompts", help="JSONL with the columns prompt and reference")
    parser.add_argument("--metric", default="f1", choices=("f1", "exact", "math"), help="compares with the reference")
    parser.add_argument("--engine", default="huggingface", choices=("huggingface", "vllm"))
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-model-length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=32, help="prompts")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/evaluate_any_checkpoint"))
    options = parser.parse_args()
    if (options.task is None) == (options.prompts is None):
        parser.error("pass either --task or --prompts")

    task: dict = {"name": options.task or "prompts", "temperature": 0.0}
    if options.prompts is not None:
        task["prompts"] = [{"kind": "file", "path": options.prompts, "limit": options.limit}]
        task["metrics"] = [{"kind": options.metric, "column": "reference"}]
        task["max_new_tokens"] = options.max_new_tokens
    folders = [path / "model" if (path / "model").is_dir() else path for path in options.checkpoints]
    evaluate = {
        "kind": "evaluate",
        "models": ["base", *(str(folder.resolve()) for folder in folders[1:])],
        "tasks": [task],
        "rollout": {"engine": options.engine, "max_model_length": options.max_model_length},
    }
    model = {"kind": "pretrained", "path": str(folders[0].resolve())}
    recipe = Recipe.model_validate({"name": "evaluate", "model": model, "stages": {"evaluate": evaluate}})
    run(recipe, options.run_dir, start="base", say=lambda line: None)

    results = json.loads((options.run_dir / "evaluate" / "results.json").read_text(encoding="utf-8"))
    found = results["tasks"][task["name"]]["models"]
    for path, name in zip(options.checkpoints, evaluate["models"], strict=True):
        for label, metric in found[name]["metrics"].items():
            interval = f"[{metric['low']:.3f}, {metric['high']:.3f}]" if metric["low"] is not None else ""
            mean = "not scored" if metric["mean"] is None else f"{metric['mean']:.3f}"
            print(f"{path}  {label} {mean} {interval}  n {metric['n']}", flush=True)
    print(f"report: {options.run_dir / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
