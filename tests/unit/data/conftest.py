"""Fixtures of the data tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from align.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A tokenizer of 256 bytes and 3 special tokens without merges: one token per ASCII character, easy to count."""
    return train_tokenizer(["a"], 259)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Function that writes rows to a JSONL file and returns its path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
