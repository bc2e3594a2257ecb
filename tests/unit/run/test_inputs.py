"""The files whose change makes a result stale, and the hash of a file."""

from __future__ import annotations

import builtins
import hashlib
import time
from pathlib import Path

import pytest
import yaml

from align.config import load_recipe
from align.config.recipe import BASE, Recipe
from align.run import inputs
from align.run.inputs import changed_input, content_digest, fingerprints

STAGES = {
    "sft": {
        "kind": "sft",
        "init_from": "./parent",
        "data": {"train": [{"path": "rows"}], "held_out": [{"path": "h.jsonl"}]},
    },
    "ppo": {
        "kind": "ppo",
        "prompts": [{"path": "h.jsonl"}],
        "rewards": [{"kind": "function", "path": "mine.py:score"}, {"kind": "model", "init_from": "./reward"}],
    },
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that reads a folder of data, a file, a reward function, and three checkpoints by path."""
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "parent/model", "reward", "rows"):
        (tmp_path / folder).mkdir(parents=True)
    files = "model/config.json model/model.safetensors parent/model/config.json reward/config.json rows/1.jsonl h.jsonl"
    for name in (*files.split(), "rows/README.md", "mine.py"):
        (tmp_path / name).write_text(name)
    model = {"kind": "pretrained", "path": "./model"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"name": "t", "model": model, "stages": STAGES}))
    return load_recipe(tmp_path / "t.yaml")


@pytest.mark.parametrize(
    ("stage", "file", "named"),
    [
        (BASE, "model/model.safetensors", "./model/model.safetensors"),
        ("sft", "parent/model/config.json", "./parent/config.json"),
        ("sft", "rows/1.jsonl", "rows/1.jsonl"),
        ("sft", "rows/2.jsonl", "rows/2.jsonl"),
        ("sft", "h.jsonl", "h.jsonl"),
        ("ppo", "mine.py", "mine.py"),
        ("ppo", "reward/config.json", "./reward/config.json"),
    ],
)
def test_every_file_that_a_stage_reads_is_compared(recipe: Recipe, stage: str, file: str, named: str) -> None:
    before = fingerprints(recipe, stage)
    assert changed_input(recipe, stage, before) is None
    Path(file).write_text("something else")
    assert changed_input(recipe, stage, before) == named


def test_a_file_that_is_not_read_may_change(recipe: Recipe) -> None:
    before = fingerprints(recipe, "sft")
    Path("rows/README.md").write_text("something else")
    assert changed_input(recipe, "sft", before) is None


def test_a_file_that_is_removed_from_a_folder_is_a_change(recipe: Recipe) -> None:
    Path("rows/0.jsonl").touch()
    before = fingerprints(recipe, "sft")
    Path("rows/0.jsonl").unlink()
    assert changed_input(recipe, "sft", before) == "rows/0.jsonl"


def test_a_small_file_is_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert (
        content_digest(tmp_path / "model.safetensors", tmp_path) == "sha256:" + hashlib.sha256(b"weights").hexdigest()
    )


def test_a_large_checkpoint_is_hashed_by_header_size_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 10)
    monkeypatch.setattr(inputs, "BLOCKS", 5)
    file = tmp_path / "model.safetensors"
    content = bytearray((20).to_bytes(8, "little") + bytes(range(20)) + bytes(5000))
    found = set()
    # As written; then with another byte in the header, at the end, and in the middle block; then one byte longer.
    for change in (None, 12, len(content) - 1, (len(content) - 10) // 2 + 3):
        changed = bytearray(content)
        if change is not None:
            changed[change] ^= 1
        file.write_bytes(changed)
        found.add(content_digest(file, tmp_path))
    file.write_bytes(content + b"\0")
    found.add(content_digest(file, tmp_path))
    assert len(found) == 5


def test_a_large_data_file_is_read_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    file = Path("rows/0.jsonl").resolve()
    file.write_bytes(b"{}\n" * 2**19)
    time.sleep(0.12)  # the hash of a file that has just been written is not kept
    before = fingerprints(recipe, "sft")
    assert before["rows"]["0.jsonl"] == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    opened: list[str] = []
    really = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda name, *rest, **more: opened.append(str(name)) or really(name, *rest, **more)
    )
    assert fingerprints(recipe, "sft") == before
    assert not [name for name in opened if name.endswith("0.jsonl")]
    file.write_bytes(b"[]\n" * 2**19)
    assert changed_input(recipe, "sft", before) == "rows/0.jsonl"
    assert [name for name in opened if name.endswith("0.jsonl")]
