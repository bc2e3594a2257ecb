"""Facts about a stage's class: its references, sources and result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config import load_recipe
from align.config.parts import FileSource, SourceBase
from align.config.recipe import Recipe
from align.config.rewards import FunctionReward
from align.config.stage import find
from align.errors import UserError

ROWS = [{"kind": "file", "path": "rows.jsonl"}]
PAIRS = [{"kind": "stage", "stage": "pairs"}]
REWARDS = [{"kind": "model", "init_from": "scores"}, {"kind": "function", "path": "mine.py:score"}]


def recipe(**changes: Any) -> Recipe:
    stages = {
        "pairs": {"kind": "sample", "train": ROWS, "held_out": ROWS},
        "scores": {"kind": "reward_model", "data": {"train": PAIRS, "held_out": ROWS}},
        "dpo": {"kind": "dpo", "data": {"train": PAIRS}, "init_from": "./elsewhere"},
        "ppo": {"kind": "ppo", "prompts": ROWS, "rewards": REWARDS, "critic": {"init_from": "scores"}},
        "compare": {
            "kind": "evaluate",
            "models": ["dpo", "ppo"],
            "prompts": ROWS,
            "preferences": PAIRS,
            "reward_model": "scores",
            "reference": "base",
            "tasks": [{"name": "sums", "prompts": ROWS, "metrics": [{"kind": "function", "path": "mine.py:sum"}]}],
        },
    }
    values = {"name": "t", "model": {"kind": "pretrained", "path": "./model"}, "stages": stages}
    for path, value in changes.items():
        stage, key = path.split("__")
        stages[stage][key] = value
    return Recipe.model_validate(values)


def test_references_and_their_fields() -> None:
    found = {name: [(r.field, r.name) for r in stage.references()] for name, stage in recipe().stages.items()}
    assert found == {
        "pairs": [("init_from", "base")],
        "scores": [("init_from", "base"), ("data.train", "pairs")],
        "dpo": [("init_from", "./elsewhere"), ("data.train", "pairs")],
        "ppo": [("init_from", "base"), ("rewards", "scores"), ("critic.init_from", "scores")],
        "compare": [
            ("models", "dpo"),
            ("models", "ppo"),
            ("reward_model", "scores"),
            ("reference", "base"),
            ("preferences", "pairs"),
        ],
    }


def test_sources_and_reward_functions_are_found_in_any_depth() -> None:
    stages = recipe().stages
    assert [field for field, _ in find(stages["pairs"], SourceBase)] == ["train", "held_out"]
    assert [field for field, _ in find(stages["scores"], FileSource)] == ["data.held_out"]
    assert [field for field, _ in find(stages["compare"], SourceBase)] == [
        "prompts",
        "tasks.sums.prompts",
        "preferences",
    ]
    assert [(field, f.path) for field, f in find(stages["ppo"], FunctionReward)] == [("rewards", "mine.py:score")]
    assert [field for field, _ in find(stages["compare"], FunctionReward)] == ["tasks.sums.metrics"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores__init_from": "pairs"},
            "needs a language model or a reward model, but 'pairs' makes preference pairs",
        ),
        ({"ppo__init_from": "scores"}, "needs a language model, but 'scores' makes a reward model"),
        (
            {"ppo__rewards": [{"kind": "model", "init_from": "dpo"}]},
            "a reward model, but 'dpo' makes a language model",
        ),
        (
            {"ppo__critic": {"init_from": "pairs"}},
            "critic.init_from needs .* but 'pairs' makes preference pairs",
        ),
        (
            {"dpo__data": {"train": [{"kind": "stage", "stage": "scores"}]}},
            "data.train needs preference pairs, but 'scores' makes a reward model",
        ),
        ({"compare__reward_model": "ppo"}, "needs a reward model, but 'ppo' makes a language model"),
        ({"compare__models": ["scores"]}, "needs a language model, but 'scores' makes a reward model"),
    ],
)
def test_a_reference_to_a_stage_that_makes_something_else_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**change)


def test_a_critic_and_a_reward_model_may_start_from_either_kind_of_model() -> None:
    recipe(ppo__critic={"init_from": "dpo"}, scores__init_from="base")


def test_stages_that_train_and_stages_that_generate() -> None:
    stages = recipe().stages
    assert [name for name, stage in stages.items() if stage.trains] == ["scores", "dpo", "ppo"]
    assert {name: stage.generates_with for name, stage in stages.items()} == {
        "pairs": "base",
        "scores": None,
        "dpo": None,
        "ppo": "base",
        "compare": "dpo",
    }


def test_a_missing_reward_function_of_a_task_is_named(tmp_path: Path) -> None:
    from align.preflight import problems

    (tmp_path / "rows.jsonl").touch()
    found = problems(recipe(), ["compare"])
    assert any(line.startswith("stages.compare.tasks.sums.metrics: ") for line in found)


def test_unknown_stage_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"stages\.dpo\.init_from: 'sfft' is not an earlier stage"):
        load_recipe("tiny", ["stages.dpo.init_from=sfft"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"importance": {"correction": "mask"}},
        {"old_logprobs": "rollout", "dual_clip": 3.0},
    ],
)
def test_overlap_is_accepted_with_a_correction_or_a_bound(settings: dict) -> None:
    rollout = {"engine": "remote", "start_servers": 1}
    stage = {"kind": "ppo", "prompts": ROWS, "rewards": REWARDS[1:], "overlap": True, "rollout": rollout, **settings}
    values = {"name": "t", "model": {"kind": "pretrained", "path": "./model"}, "stages": {"ppo": stage}}
    assert Recipe.model_validate(values).stages["ppo"].trains
