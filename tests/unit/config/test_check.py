"""`align check` judges a recipe as `align run` would take it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from align.cli import main
from align.config import load_recipe
from align.errors import UserError


def test_changes_are_judged_with_the_recipe(capsys) -> None:
    main(["check", "tiny", "stages.dpo.beta=0.2"])
    assert capsys.readouterr().out == "tiny: ok\n"
    with pytest.raises(SystemExit) as ended:
        main(["check", "tiny", "quickstart", "stages.dpo.beta=-1"])
    problems = capsys.readouterr().err
    assert ended.value.code == 2
    assert problems.count("stages.dpo.beta") == 2


def test_changes_alone_are_no_recipe(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "stages.dpo.beta=0.2"])
    assert ended.value.code == 2
    assert "put a recipe's name or file in front" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ("stages.sft.bach_size=8", "did you mean 'batch_size'?"),
        ("stages.sft.max_length=8", "did you mean 'data.max_length'?"),
        ("stages.ppo.learning_rate=1e-4", "did you mean 'critic.learning_rate' or 'optimizer.learning_rate'?"),
        ("stages.ppo.advantage=grpo", "known keys are algorithm, batch_size"),
        ("stages.dpo.lora.r=8", "known keys are alpha, attention, dropout, experts, rank"),
    ],
)
def test_an_unknown_key_is_met_with_what_may_have_been_meant(change: str, hint: str) -> None:
    """A near spelling, or a section that has the key; nothing far-fetched, which would change something else."""
    with pytest.raises(UserError) as error:
        load_recipe("tiny", [change])
    assert hint in str(error.value)


@pytest.mark.parametrize("processes", [3, 4, 16])
def test_batches_that_processes_cannot_share_are_told_for_all_stages_with_values_that_work(processes: int) -> None:
    """Each of the named values is written into the recipe, and the recipe is then taken."""
    wanted = [f"parallel.processes={processes}"]
    with pytest.raises(UserError) as error:
        load_recipe("tiny", wanted)
    lines = str(error.value).splitlines()
    named = [re.search(r"stages\.(\w+): micro.*; set (.*)\.$", line) for line in lines]
    assert [match[1] for match in named if match] == ["pretrain", "sft", "reward_model", "dpo"]
    for way in ("micro_batch_size", "batch_size"):
        values = [(match[1], re.search(rf"\b{way} to (\d+)", match[2])) for match in named if match]
        changes = [f"stages.{stage}.{way}={value[1]}" for stage, value in values if value]
        if way == "batch_size" or processes == 4:
            assert len(changes) == 4
            load_recipe("tiny", [*wanted, *changes])


def recipe_with(tmp_path: Path, **ppo: object) -> str:
    """Pairs from an earlier stage, a parent from the hub, and whatever `ppo` changes."""
    prompts = [{"kind": "file", "path": str(tmp_path / "rows.jsonl")}]
    stages = {
        "pairs": {"kind": "sample", "train": prompts},
        "dpo": {"kind": "dpo", "data": {"train": [{"kind": "stage", "stage": "pairs"}]}},
        "ppo": {"kind": "ppo", "prompts": prompts, "rewards": [{"kind": "length", "max_tokens": 8}], **ppo},
    }
    content = {"name": "t", "model": {"kind": "pretrained", "path": "owner/name"}, "stages": stages}
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(tmp_path / "t.yaml")


def test_only_what_this_machine_must_have_is_looked_for(tmp_path: Path, capsys) -> None:
    """Not what an earlier stage makes, nor what the hub may have; and a user's file is not run."""
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')\n")
    reward = {"kind": "function", "path": f"{tmp_path / 'mine.py'}:score"}
    path = recipe_with(tmp_path, rewards=[reward, {"kind": "function", "path": "reference_f1"}])
    main(["check", path])
    assert capsys.readouterr().out == f"{path}: ok\n"


def test_all_that_is_missing_is_told_at_once(tmp_path: Path, capsys) -> None:
    rewards = [{"kind": "function", "path": "absent.py:score"}, {"kind": "model", "init_from": "./absent-model"}]
    path = recipe_with(tmp_path, rewards=rewards, init_from="./absent-parent")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["check", path, "model.path=./absent-base"])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()
    things = ("./absent-base", "rows.jsonl", "rows.jsonl", "./absent-parent", "./absent-model", "absent.py")
    assert len(told) == len(things)
    assert all(thing in line for thing, line in zip(things, told, strict=True))
    main(["check", "--without-files", "--json", path])
    assert json.loads(capsys.readouterr().out) == {path: {"ok": True, "error": None}}
