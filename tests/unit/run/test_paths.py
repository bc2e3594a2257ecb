"""`~` in every path of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from align import cli
from align.cli import runs
from align.config import load_recipe
from align.config.paths import local_path
from align.config.recipe import BASE
from align.data.mixture import mixture_rows
from align.errors import UserError
from align.launch.processes import read_hostfile
from align.parallel.deepspeed_config import deepspeed_config
from align.parallel.offload import free_disk
from align.preflight import problems
from align.reward.functions import find_reward_function
from align.run.context import StageContext

RECIPE = {
    "name": "t",
    "parallel": {"processes": 1, "hostfile": "~/hosts", "offload": {"parameters": "nvme", "path": "~/disk"}},
    "model": {"kind": "pretrained", "path": "~/model"},
    "stages": {
        "sft": {"kind": "sft", "init_from": "~/model", "data": {"train": [{"path": "~/rows.jsonl"}]}},
        "ppo": {
            "kind": "ppo",
            "prompts": [{"path": "~/rows.jsonl"}],
            "rewards": [{"kind": "function", "path": "~/mine.py:score"}, {"kind": "model", "init_from": "~/model"}],
        },
    },
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    (home / "disk").mkdir()
    (home / "model" / "config.json").write_text(json.dumps({"num_experts": 4}))
    (home / "model" / "tokenizer.json").write_text("{}")
    (home / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (home / "mine.py").write_text("def score(prompts, completions, rows): return [1.0] * len(rows)\n")
    (home / "hosts").write_text("localhost slots=1\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def test_preflight_and_what_reads_the_file_agree(home: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(RECIPE))
    recipe = load_recipe(tmp_path / "t.yaml")
    assert problems(recipe, [BASE, *recipe.stages]) == []
    parallel, sft = recipe.parallel, recipe.stages["sft"]
    assert StageContext(recipe, "sft", tmp_path / "run").checkpoint("~/model") == home / "model"
    assert len(list(mixture_rows(sft.data.train, seed=0))) == 1
    assert find_reward_function("~/mine.py:score") == (str(home / "mine.py"), "score")
    assert read_hostfile(Path(parallel.hostfile)) == {"localhost": 1}
    assert free_disk(parallel.offload.path) > 0
    config = deepspeed_config(parallel, micro_batch_size=1, accumulation=1, max_grad_norm=1.0, dtype="float32")
    assert config["zero_optimization"]["offload_param"]["nvme_path"] == str(home / "disk")


def test_the_home_of_a_user_who_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^~nobody-here/x: this machine has no home directory for '~nobody-here'"):
        local_path("~nobody-here/x")


def test_a_command_expands_the_home_directory_where_the_shell_does_not(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(runs, "_report", lambda options: ran.append(options.run_dir))
    cli.main(["report", "~/run"])
    assert ran == [home / "run"]
