"""The working folder of each case."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .here import Here, save_checkpoint, working_folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A small HunYuan checkpoint: its folder and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    return folder, save_checkpoint(folder)


@pytest.fixture
def here(checkpoint: tuple[Path, Any], tmp_path: Path) -> Iterator[Here]:
    with working_folder(tmp_path, *checkpoint) as here:
        yield here
