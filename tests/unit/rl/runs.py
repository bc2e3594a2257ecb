"""Recipe of a PPO stage on a small base model, loaded from YAML as for a user, and the lines that its run logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from align.config import load_recipe
from align.config.recipe import Recipe
from tests.integration.runs import NOISE, small_model

REWARD = '''
def score(prompts, completions, rows):
    """The share of vowels."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
'''


def recipe(folder: Path, before: dict[str, Any] | None = None, **ppo: Any) -> Recipe:
    """A recipe whose reward function and prompts are in `folder`.

    before: stages before the PPO stage.
    ppo: overrides keys of the PPO stage.
    """
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    prompts = [{"prompt": f"Say {word}."} for word in ("one", "two", "three", "four", "five", "six")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    content = {
        "name": "rl",
        "model": small_model([{"kind": "python_docs", "view": "text", "limit": 20}], initializer_range=0.1),
        "stages": (before or {})
        | {
            "ppo": {
                "kind": "ppo",
                "prompts": [{"kind": "file", "path": str(folder / "prompts.jsonl")}],
                "max_prompt_length": 48,
                "rewards": [{"kind": "function", "path": f"{folder / 'reward.py'}:score"}],
                "optimizer": {"learning_rate": 3e-3, "eps": 1e-5, "schedule": "linear", "warmup_fraction": 0.0},
                "steps": 4,
                "batch_size": 8,
                "mini_batch_size": 4,
                "completions_per_prompt": 2,
                "checkpoint_every": 2,
                "sample_every": 1,
                **ppo,
                "rollout": {
                    "engine": "huggingface",
                    "max_new_tokens": 8,
                    "max_model_length": 64,
                    **ppo.get("rollout", {}),
                },
            }
        },
    }
    path = folder / "rl.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_recipe(path)


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines of a file of the `ppo` stage, without the values that differ between equal runs (NOISE)."""
    text = (run_dir / "ppo" / name).read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(NOISE)} for line in text.splitlines()]
