"""What the cases share: an empty working folder with a small checkpoint, and a register of the cases."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from align import cli
from align.data import prepare_chat_template

CASES: dict[str, Callable[[Here], str | None]] = {}
ANSWERS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(8)
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "max_position_embeddings": 128,
}


def wrong(name: str) -> Callable:
    """Register a case. It returns what was said, or lets a `UserError` through."""

    def register(case: Callable[[Here], str | None]) -> Callable[[Here], str | None]:
        assert name not in CASES
        CASES[name] = case
        return case

    return register


class Here:
    """An empty working folder with a small checkpoint in model/ and conversations in rows.jsonl."""

    def __init__(self, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.tokenizer, self.monkeypatch = folder, tokenizer, monkeypatch
        self.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ANSWERS))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def recipe(self, *, model: Any = None, stages: Any = None, **stage: Any) -> None:
        """recipe.yaml with one SFT stage; `stage` changes its keys."""
        data = {"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 64}
        sft = {"kind": "sft", "data": data, "batch_size": 4, "micro_batch_size": 4, "max_steps": 1} | stage
        values = {
            "name": "t",
            "model": {"kind": "pretrained", "path": "model"} if model is None else model,
            "stages": {"sft": sft} if stages is None else stages,
        }
        self.write("recipe.yaml", yaml.safe_dump(values, sort_keys=False))

    def align(self, *arguments: str) -> str:
        """What `align` writes to standard error before it exits with 2."""
        said, out = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        assert stopped.value.code == 2
        assert "Traceback" not in said.getvalue() + out.getvalue()
        return said.getvalue().strip().splitlines()[-1].removeprefix("align: ").removeprefix("error: ")

    def check(self, **changes: Any) -> str:
        self.recipe(**changes)
        return self.align("check", "recipe.yaml")

    def run(self, *arguments: str, **changes: Any) -> str:
        self.recipe(**changes)
        return self.align("run", "recipe.yaml", "--run-dir", "run", *arguments)

    def change_config(self, **values: Any) -> None:
        path = self.folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def change_weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = self.folder / "model" / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    def with_template(self, template: str) -> Any:
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.name_or_path = "model"
        tokenizer.chat_template = template
        prepare_chat_template(tokenizer)
        return tokenizer


def sample_stage(**rollout: Any) -> dict[str, Any]:
    return {"kind": "sample", "train": [{"kind": "file", "path": "rows.jsonl"}], "rollout": rollout}


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
