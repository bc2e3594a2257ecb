"""Rewards, generation and optional packages."""

from __future__ import annotations

from typing import Any

from align.reward.functions import call_reward_function, load_reward_function

from .here import Here, wrong


def ppo_stage(reward: str) -> dict[str, Any]:
    return {
        "kind": "ppo",
        "prompts": [{"kind": "file", "path": "rows.jsonl"}],
        "rewards": [{"kind": "function", "path": reward}],
    }


def score_with(here: Here, body: str) -> None:
    here.write("mine.py", f"def score(prompts, completions, rows):\n    {body}\n")
    function = load_reward_function("mine.py:score")
    call_reward_function("mine.py:score", function, ["a", "b"], ["c", "d"], [{}, {}])


@wrong("reward-file-missing")
def _(here: Here) -> str:
    said = here.run(stages={"ppo": ppo_stage("mine.py:score")})
    assert not (here.folder / "run" / "base").exists()  # refused before the model was loaded
    return said


@wrong("reward-without-function")
def _(here: Here) -> None:
    here.write("mine.py", "x = 1\n")
    load_reward_function("mine.py:score")


@wrong("reward-import-raises")
def _(here: Here) -> None:
    here.write("mine.py", "import nothing_like_it\n")
    load_reward_function("mine.py:score")


@wrong("reward-raises")
def _(here: Here) -> None:
    score_with(here, "return [len(row['answer']) for row in rows]")


@wrong("reward-wrong-length")
def _(here: Here) -> None:
    score_with(here, "return [1.0]")


@wrong("reward-not-a-list")
def _(here: Here) -> None:
    score_with(here, "pass")


@wrong("reward-nan")
def _(here: Here) -> None:
    score_with(here, "return [0.5, float('nan')]")
