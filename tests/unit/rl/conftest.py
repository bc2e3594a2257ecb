"""One base model for all runs of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from align.pipeline import run
from tests.unit.rl.runs import recipe


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A run folder whose base model is made."""
    folder = tmp_path_factory.mktemp("base")
    run(recipe(folder), folder / "run", only="base", say=lambda line: None)
    return folder / "run"


@pytest.fixture
def start(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A new run folder that has the base model."""

    def make(name: str) -> Path:
        shutil.copytree(base, tmp_path / name)
        return tmp_path / name

    return make
