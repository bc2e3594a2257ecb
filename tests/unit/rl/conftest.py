"""Fixtures: a base model that all runs in this folder share, and a batch of completions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from align.data.experience import Experience
from align.pipeline import run
from align.rl.score import to_experience
from tests.unit.rl.runs import recipe
from tests.unit.rl.small import EOS, completions


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A run folder with a finished base model."""
    folder = tmp_path_factory.mktemp("base")
    run(recipe(folder), folder / "run", only="base", say=lambda line: None)
    return folder / "run"


@pytest.fixture
def start(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Function that creates a run folder of this name with the base model."""

    def make(name: str) -> Path:
        shutil.copytree(base, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def batch() -> Experience:
    """Three completions of different lengths: ended by EOS, truncated, and EOS twice. EOS is also the pad token."""
    return to_experience(
        completions(([5, 6], [7, 8, EOS], True), ([5], [9, 9, 9, 9], False), ([5, 6, 7], [EOS, EOS], True))
    )
