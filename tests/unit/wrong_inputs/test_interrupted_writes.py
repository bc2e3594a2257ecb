"""A refused or interrupted command leaves nothing that a later run would misread."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from align.errors import UserError
from align.run.folder import replace_folder, write_json

from .here import SIZES, Here, full_disk


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyError("x"), KeyboardInterrupt()]
)
def test_an_interrupted_write_leaves_the_old_folder(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "model"
    replace_folder(target, lambda folder: (folder / "weights").write_text("old"))  # type: ignore[arg-type,return-value]

    def write(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise failure

    expected = UserError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        replace_folder(target, write)
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "manifest.json", {"a": 1})
    monkeypatch.setattr("align.run.folder.os.replace", full_disk)
    with pytest.raises(UserError, match="the disk is full; free some space"):
        write_json(tmp_path / "manifest.json", {"a": 2})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_refused_stage_does_not_count_as_interrupted(here: Here) -> None:
    said = here.run(data={"train": [{"kind": "file", "path": "nowhere.jsonl"}]})
    assert "does not exist" in said
    assert not (here.folder / "run" / "sft").exists()
    assert "does not exist" in here.run(data={"train": [{"kind": "file", "path": "elsewhere.jsonl"}]})


def test_base_can_be_made_again(here: Here) -> None:
    """`--from base` replaces the base model by one from another source and back, also after a failed first attempt."""
    (here.folder / "other").mkdir()
    assert "config.json does not exist" in here.run(model={"kind": "pretrained", "path": "other"})
    here.write("bad.jsonl", '{"prompt": "Hi", "completion": " "}\n')
    bad = {"train": [{"kind": "file", "path": "bad.jsonl"}]}
    assert "bad.jsonl" in here.run(data=bad)  # the base model is saved, and the next stage is refused
    scratch = {"kind": "scratch", "tokenizer": "./model", "config": SIZES}
    assert "add --from base" in here.run(model=scratch, data=bad)
    assert "bad.jsonl" in here.run("--from", "base", model=scratch, data=bad)
    weights = here.folder / "run" / "base" / "model" / "model.safetensors"
    assert not weights.is_symlink()
    assert "bad.jsonl" in here.run("--from", "base", data=bad)
    assert weights.is_symlink()
