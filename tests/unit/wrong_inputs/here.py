"""The registry of cases and their working folder."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from align import cli
from align.data.chat import prepare_chat_template
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM

# The sections of docs/errors.md in their order, each with the modules that hold its cases.
SECTIONS = {
    "Recipes": ["recipes"],
    "The command line": ["command_line"],
    "Data": ["data"],
    "Checkpoints": ["checkpoints"],
    "LoRA adapters": ["lora", "adapters"],
    "Serving and chat": ["serving"],
    "Chat templates": ["templates"],
    "The run folder and the disk": ["run_folder"],
    "Rewards, generation and optional packages": ["rewards", "generation"],
    "Evaluation": ["evaluation", "eval_command", "judging", "judged_tasks", "long_context", "own_tasks"],
    "Sweeps": ["sweeps"],
    "Several processes and machines": ["several"],
    "Planning a cluster": ["planning"],
}
# Patterns for `varies`. They contain no words of the messages, so the wording of a message can change.
NUMBER = r"\d+(,\d{3})*(\.\d+)?"
PORT = r"\b\d{4,5}\b"
IN_PARENTHESES = r"(?<=\().+(?=\))"
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


@dataclass(frozen=True)
class Case:
    """One wrong input.

    name         its name in the tests and in the last column of docs/errors.md
    description  what is wrong, for the first column
    varies       pattern of the parts that differ between machines or runs; docs/errors.md has `…` instead
    module       name of the module that defines the case, which decides its section
    run          gives the wrong input; returns the sentence or raises it as a `UserError`
    """

    name: str
    description: str
    varies: str
    module: str
    run: Callable[[Here], str | None]

    def sentence(self, here: Here) -> str:
        """The sentence that the user reads, with `…` for the varying parts and the working folder."""
        try:
            said = self.run(here)
        except UserError as error:
            said = str(error)
        assert said, f"{self.name}: accepted without an error"
        said = said.replace(str(here.folder), "…")
        return re.sub(self.varies, "…", said) if self.varies else said


CASES: dict[str, Case] = {}


def wrong(name: str, description: str, varies: str = "") -> Callable:
    """Register a case."""

    def register(run: Callable[[Here], str | None]) -> Callable[[Here], str | None]:
        assert name not in CASES, f"two cases are named {name}"
        CASES[name] = Case(name, description, varies, run.__module__.rpartition(".")[2], run)
        return run

    return register


class Here:
    """A working folder with a small checkpoint in model/ and conversations in rows.jsonl."""

    def __init__(self, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.tokenizer, self.monkeypatch = folder, tokenizer, monkeypatch
        self.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ANSWERS))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def recipe(self, *, model: Any = None, stages: Any = None, **stage: Any) -> None:
        """Write recipe.yaml with one SFT stage; `stage` overrides its keys."""
        data = {"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 64}
        sft = {"kind": "sft", "data": data, "batch_size": 4, "micro_batch_size": 4, "max_steps": 1} | stage
        values = {
            "name": "t",
            "model": {"kind": "pretrained", "path": "model"} if model is None else model,
            "stages": {"sft": sft} if stages is None else stages,
        }
        self.write("recipe.yaml", yaml.safe_dump(values, sort_keys=False))

    def align(self, *arguments: str) -> str:
        """Run `align`, which must exit with status 2; return the last line of its standard error."""
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


def save_checkpoint(folder: Path) -> Any:
    """Save a HunYuan checkpoint of two layers with its tokenizer; return the tokenizer."""
    tokenizer = train_tokenizer([row["messages"][0]["content"] for row in ANSWERS], 300)
    torch.manual_seed(0)
    HunYuanForCausalLM(HunYuanConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@contextlib.contextmanager
def working_folder(folder: Path, model: Path, tokenizer: Any) -> Iterator[Here]:
    """Work in `folder` with a copy of the checkpoint `model`; restore directory and environment at the end."""
    shutil.copytree(model, folder / "model")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TRL_EXPERIMENTAL_SILENCE"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setenv("ALIGN_CACHE", str(folder / "tokenised"))
        yield Here(folder, tokenizer, monkeypatch)


def sample_stage(**rollout: Any) -> dict[str, Any]:
    return {"kind": "sample", "train": [{"kind": "file", "path": "rows.jsonl"}], "rollout": rollout}


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
