"""The version of the code in a manifest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from align.run import manifest

ROOT = Path(__file__).parents[3]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "one")
    return tmp_path


def test_the_commit_of_aligns_own_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "__file__", str(repository / "align" / "run" / "manifest.py"))
    assert manifest.code_version() == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}
    (repository / "new").touch()
    assert manifest.code_version()["dirty"] is True


def test_no_commit_if_align_is_installed_inside_somebody_elses_repository(repository, monkeypatch) -> None:
    site = repository / ".venv" / "lib" / "site-packages"
    (site / "align" / "run").mkdir(parents=True)
    monkeypatch.setattr(manifest, "__file__", str(site / "align" / "run" / "manifest.py"))
    assert manifest.code_version() == {"commit": None, "dirty": None}
