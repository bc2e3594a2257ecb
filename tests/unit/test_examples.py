"""Every program and recipe in examples/ runs, on models small enough for a test."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.cli import main
from align.config import load_recipe
from align.pipeline import run
from align.run.folder import read_jsonl
from tests.integration.runs import ROOT, small_model

EXAMPLES = ROOT / "examples"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
PAIRS = [{"prompt": f"Say {word}.", "chosen": f"It is {word}.", "rejected": "No." * (i % 3 + 1)}
         for i, word in enumerate(WORDS)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs.jsonl and a finished run of DPO, three steps on all pairs each."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    text = [{"kind": "file", "path": str(folder / "pairs.jsonl"), "columns": {"text": "chosen"}}]
    dpo = {
        "kind": "dpo",
        "data": {"train": [{"kind": "file", "path": str(folder / "pairs.jsonl")}], "max_length": 64},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "beta": 0.3,
        "batch_size": len(PAIRS),
        "micro_batch_size": len(PAIRS),
        "max_steps": 3,
    }
    model = small_model(text, initializer_range=0.1, router_aux_loss_coef=0.02, moe_topk=1)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "pairs", "model": model, "stages": {"dpo": dpo}}))
    run(load_recipe(folder / "recipe.yaml"), folder / "run", say=lambda line: None)
    return folder


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a program of examples/ with some arguments and returns what it prints."""

    def run_example(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_dpo_prints_the_losses_of_the_stage(folder: Path, output) -> None:
    printed = output(
        "dpo_in_one_page.py", folder / "run/base/model", folder / "pairs.jsonl",
        "--beta", 0.3, "--learning-rate", 1e-3, "--batch-size", len(PAIRS), "--steps", 3,
    )  # fmt: skip
    losses = [float(value) for value in re.findall(r"loss (\S+)", printed)]
    stage = [line["loss"] for line in read_jsonl(folder / "run/dpo/metrics.jsonl") if "loss" in line]
    assert losses == pytest.approx(stage, rel=2e-5)
    assert len(set(losses)) == 3


def test_grpo_raises_its_score(folder: Path, output) -> None:
    arguments = ("--steps", 5, "--batch-size", 2, "--max-new-tokens", 24, "--learning-rate", 1e-2)
    printed = output("grpo_in_one_page.py", folder / "run/base/model", folder / "pairs.jsonl", *arguments)
    scores = [float(value) for value in re.findall(r"score (\S+)", printed)]
    assert len(scores) == 5
    assert max(scores[2:]) > scores[0]


def test_a_checkpoint_generates_in_plain_transformers(folder: Path, output) -> None:
    printed = output("use_elsewhere.py", folder / "run/dpo/model", "Say one.", "--max-new-tokens", 4)
    assert printed.startswith("HunYuanForCausalLM (align.models.hunyuan.modeling): ")


def test_any_checkpoint_is_evaluated(folder: Path, tmp_path: Path, output) -> None:
    """Untrained models of 300 entries answer nothing right; the reference itself would score 1."""
    checkpoints = folder / "run/base", folder / "run/dpo/model"
    printed = output(
        "evaluate_any_checkpoint.py", *checkpoints, "--prompts", folder / "pairs.jsonl", "--metric", "exact",
        "--max-new-tokens", 4, "--run-dir", tmp_path / "run",
    )  # fmt: skip
    lines = printed.splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == [str(path) for path in checkpoints]
    assert all(f"exact 0.000 [0.000, 0.000]  n {len(PAIRS)}" in line for line in lines[:2])
    assert (tmp_path / "run" / "report.html").is_file()


def test_your_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    changes = ["stages.sft.epochs=1", "stages.dpo.max_steps=1", "model.config.num_hidden_layers=2"]
    recipe = load_recipe(EXAMPLES / "your_own_data" / "recipe.yaml", changes)
    run(recipe, tmp_path / "run", say=lambda line: None)
    counts = {
        stage: json.loads((tmp_path / "run" / stage / "manifest.json").read_text())["data"] for stage in ("sft", "dpo")
    }
    assert {stage: (data["rows_read"], data["dropped"]) for stage, data in counts.items()} == {
        "sft": (20, {}),
        "dpo": (20, {}),
    }
    assert counts["dpo"]["rows_held_out"] > 0


def test_your_own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = [sys.executable, str(EXAMPLES / "your_own_reward" / "server.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            changes = [
                "stages.grpo.steps=1", "stages.grpo.batch_size=8", "stages.grpo.mini_batch_size=8",
                "stages.grpo.rollout.engine=huggingface",
            ]  # fmt: skip
            text = (EXAMPLES / "your_own_reward" / "recipe.yaml").read_text(encoding="utf-8")
            assert "http://127.0.0.1:8123" in text
            (tmp_path / "recipe.yaml").write_text(text.replace("http://127.0.0.1:8123", url), encoding="utf-8")
            run(load_recipe(tmp_path / "recipe.yaml", changes), tmp_path / "run", say=lambda line: None)
        finally:
            server.terminate()
    metrics = read_jsonl(tmp_path / "run" / "grpo" / "metrics.jsonl")[0]
    assert 0 < metrics["reward/vowels"] < 1
    assert 0 <= metrics["reward/lower_case"] <= 1
    assert metrics["score_mean"] == pytest.approx(metrics["reward/vowels"] + 0.5 * metrics["reward/lower_case"])


def test_the_cluster_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Its plan and its check run, its figures are the plan's, the script is valid bash, the hosts are the plan's."""
    page = (EXAMPLES / "cluster" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ +(align (?:plan|check) .*)$", page, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["plan", "check"]
    for command in commands:
        main(shlex.split(command)[1:])
    printed = capsys.readouterr().out
    assert "does not fit" not in printed
    assert "hunyuan-large: ok" in printed
    assert "116 of 141 GB per GPU, 1,749 of 2,000 GB per host" in printed
    assert "116 of 141 GB per GPU and 1,749 of 2,000 GB per host" in page
    script = EXAMPLES / "cluster" / "hunyuan-large.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    hosts = (EXAMPLES / "cluster" / "hosts").read_text(encoding="utf-8").splitlines()
    assert len(hosts) == int(re.findall(r"--nodes=(\d+)", script.read_text())[0]) == 8
    assert all(line.endswith(" slots=8") for line in hosts)


def test_the_server_has_forty_lines() -> None:
    assert len((EXAMPLES / "your_own_reward" / "server.py").read_text(encoding="utf-8").splitlines()) <= 40


def test_the_table_names_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")} <= set(
        re.findall(r"\]\(([^)/]+)/?\)", table)
    )
