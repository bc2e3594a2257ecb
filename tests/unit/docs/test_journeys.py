"""The pages in docs/journeys are followed literally: their files are written, and their commands run, in order."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from align.cli import main
from align.run.folder import read_jsonl

ROOT = Path(__file__).parents[3]
JOURNEYS = ROOT / "docs" / "journeys"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
OF_THE_EXTENDED_COPY = "advantage_estimator=opo"
"""A command with these words runs in a copy of the package to which docs/extending.md was applied."""


def extended_copy(folder: Path) -> Path:
    extending = runpy.run_path(str(ROOT / "tests" / "unit" / "test_extending.py"))
    (section,) = re.findall(r"^## An advantage estimator$.*?(?=^## )", extending["PAGE"], re.MULTILINE | re.DOTALL)
    extending["shutil"].copytree(ROOT / "align", folder / "align", ignore=lambda *_: {"__pycache__"})
    extending["apply"](section, folder)
    return folder


class Reader:
    """Someone who reads a page from top to bottom, writes its files and types its commands."""

    def __init__(self, page: str, scratch: Path, capsys: pytest.CaptureFixture[str]):
        self.page, self.scratch, self.capsys = page, scratch, capsys
        self.printed: dict[str, str] = {}
        self.last = ""

    def follow(self) -> None:
        text = (JOURNEYS / self.page).read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(BLOCK.findall(text))
        for block in BLOCK.finditer(text):
            if block["title"]:
                Path(block["title"]).write_text(block["text"], encoding="utf-8")
            elif block["language"] == "text":  # what the command before it prints
                assert self.last == block["text"]
            elif block["language"] != "console":  # a console shows the numbers of one run
                assert block["language"] == "sh"
                for line in block["text"].splitlines():
                    self.last = self.printed[line] = self.type(line)

    def type(self, line: str) -> str:
        program, *words = shlex.split(line, comments=True)
        if program == "align" and OF_THE_EXTENDED_COPY not in line:
            main(words)
            return self.capsys.readouterr().out
        command = [sys.executable, *words] if program == "python" else [sys.executable, "-m", "align.cli", *words]
        path = str(extended_copy(self.scratch)) if program == "align" else ""
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journey")


@pytest.mark.slow
def test_a_researchers_first_study(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    reader = Reader("researcher.md", tmp_path, capsys)
    reader.follow()

    def settings(run: str) -> dict:
        return json.loads((folder / "runs" / run / "grpo" / "manifest.json").read_text())["config"]["grpo"]

    assert (folder / "runs/study/report.html").is_file()
    assert settings("faster")["optimizer"]["learning_rate"] == 3e-3
    assert settings("more_kl")["kl"]["coef"] == 0.1
    assert settings("opo")["advantage_estimator"] == "opo"
    assert not (folder / "runs" / "opo" / "sft").exists()
    sample, *_ = read_jsonl(folder / "runs/study/grpo/samples.jsonl")
    text = sample["completion"]
    assert sample["score"] == pytest.approx(sum(letter in "aeiou" for letter in text) / len(text))
    sweep = json.loads((folder / "sweeps" / "study" / "report.json").read_text())
    runs = [run for point in sweep["points"] for run in point["runs"]]
    assert [run["status"] for run in runs] == ["finished", "finished"]
    first, second = (folder / "sweeps" / "study" / run for run in ("coef-0/seed-0", "coef-0.1/seed-0"))
    assert (second / "sft").resolve() == (first / "sft").resolve()
    swept, compared = (
        next(
            printed for line, printed in reader.printed.items() if line.startswith(command) and "--dry-run" not in line
        )
        for command in ("align sweep", "align compare")
    )
    assert sweep["verdict"] in swept
    assert "stages.grpo.kl.coef" in compared


@pytest.mark.slow
def test_two_checkpoints_one_table(folder, tmp_path, monkeypatch, capsys) -> None:
    """Uses the checkpoints of the study, which the page names as its own."""
    if not (folder / "runs/study/grpo/manifest.json").is_file():
        pytest.skip("needs the runs of test_a_researchers_first_study")
    monkeypatch.chdir(folder)
    reader = Reader("evaluator.md", tmp_path, capsys)
    reader.follow()
    evaluated, compared = reader.printed.values()
    for name in ("sft", "grpo", "modules", "written"):
        assert name in evaluated
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert "8" in json.dumps(results)
    assert (folder / "evaluation" / "report.html").is_file()
    assert "modules" in compared
