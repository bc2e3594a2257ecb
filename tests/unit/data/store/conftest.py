"""Fixtures of the tests of tokenised rows on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.parts import Data, FileSource
from align.data import prepare
from align.data.files import text
from align.data.store import reading, shards


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the shards that this process writes."""
    numbers: list[int] = []
    save = shards.ShardWriter._save

    def noted(self: Any, number: int, *args: Any) -> None:
        numbers.append(number)
        save(self, number, *args)

    monkeypatch.setattr(shards.ShardWriter, "_save", noted)
    return numbers


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of ten of the rows that `conversations` makes."""
    monkeypatch.setattr(text, "CHUNK_BYTES", 10 * len(json.dumps(conversations(1)[0])))
    monkeypatch.setattr(reading, "CHUNKS", 1)


def conversations(rows: int, answer: str = "yes") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"q{n:03d}"}, {"role": "assistant", "content": f"{answer} {n:03d}"}]}
        for n in range(rows)
    ]


def tokenised(path: str | Path, cache: str | Path, tokenizer: Any, **options: Any) -> prepare.Prepared:
    data = Data(train=[FileSource(path=str(path))], cache=str(cache), **options)
    return prepare.prepare_sft(data, tokenizer, assistant_only_loss=True, seed=0)


def ids(made: prepare.Prepared) -> list[list[int]]:
    return [row["input_ids"] for row in made.train]
