"""The run folder and a full disk."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from align.config.parts import Optimizer
from align.models.hunyuan import HunYuanForCausalLM
from align.run.folder import MetricsWriter
from align.train.learner import LocalLearner

from .here import IN_PARENTHESES, NUMBER, SIZES, Here, full_disk, wrong


@wrong("run-folder-in-use", "A run folder in use by another process", varies=NUMBER)
def _(here: Here) -> str:
    code = (
        "import sys, time, pathlib; from align.run.folder import locked\n"
        "with locked(pathlib.Path('run')): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = here.run()
        assert f"process {holder.pid};" in said
        assert not (here.folder / "run" / "recipe.json").exists()
    finally:
        holder.kill()
        holder.wait()
    return said


@wrong("run-folder-is-a-file", "A run folder that is a file")
def _(here: Here) -> str:
    here.write("run", "")
    return here.run()


@wrong("interrupted", "An interrupted stage, without `--resume` or `--from`")
def _(here: Here) -> str:
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/config.json", "{}")
    return here.run()


@wrong("interrupted-with-other-settings", "An interrupted stage whose settings have changed", varies=IN_PARENTHESES)
def _(here: Here) -> str:
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/config.json", '{"seed": 1}')
    return here.run("--resume")


@wrong("changed-settings", "A finished stage whose settings have changed")
def _(here: Here) -> str:
    from align.config import load_recipe
    from align.run.manifest import stage_settings

    here.recipe()
    before = stage_settings(load_recipe("recipe.yaml"), "sft")
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/manifest.json", json.dumps({"status": "finished", "config": before}))
    said = here.run(max_steps=2)
    assert not (here.folder / "run" / "recipe.json").exists()  # the refused run wrote no recipe
    return said


@wrong("changed-parent", "A finished stage whose parent was run again")
def _(here: Here) -> str:
    from align.config import load_recipe
    from align.run.manifest import stage_settings

    here.recipe()
    settings = stage_settings(load_recipe("recipe.yaml"), "sft")
    (here.folder / "run" / "sft").mkdir(parents=True)
    finished = {"status": "finished", "config": settings, "parent_ids": {"base": "of an earlier result"}}
    here.write("run/sft/manifest.json", json.dumps(finished))
    return here.run()


@wrong("changed-input", "A data file has changed since the stage finished")
def _(here: Here) -> str:
    record_of_sft(here, "manifest.json")
    here.write("rows.jsonl", Path("rows.jsonl").read_text().replace("It is", "That is"))
    return here.run()


@wrong("interrupted-with-changed-input", "A data file has changed since the stage was interrupted")
def _(here: Here) -> str:
    record_of_sft(here, "config.json")
    here.write("rows.jsonl", Path("rows.jsonl").read_text().replace("It is", "That is"))
    return here.run("--resume")


@wrong("interrupted-with-other-rows", "The same data gives other token rows than in the interrupted run")
def _(here: Here) -> str:
    record_of_sft(here, "config.json")
    (here.folder / "run" / "sft" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    here.write("run/sft/checkpoints/checkpoint-1/complete", "")
    here.write("run/sft/rows.json", json.dumps({"fingerprint": "of an earlier version"}))
    return here.run("--resume")


def record_of_sft(here: Here, name: str) -> None:
    """Write the record of a finished (manifest.json) or interrupted (config.json) SFT stage."""
    from align.config import load_recipe
    from align.run.inputs import fingerprints
    from align.run.manifest import stage_settings

    here.recipe()
    recipe = load_recipe("recipe.yaml")
    settings, inputs = stage_settings(recipe, "sft"), fingerprints(recipe, "sft")
    finished = {"status": "finished", "config": settings, "inputs": inputs}
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write(f"run/sft/{name}", json.dumps(finished if name == "manifest.json" else settings | {"inputs": inputs}))


@wrong("damaged-manifest", "A truncated manifest")
def _(here: Here) -> str:
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/manifest.json", '{"status": "fini')
    return here.run()


@wrong("manifest-not-an-object", "A manifest that is JSON, but not an object")
def _(here: Here) -> str:
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/manifest.json", "[]")
    return here.run()


@wrong("manifest-without-settings", "A manifest without the settings of its stage")
def _(here: Here) -> str:
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/manifest.json", json.dumps({"status": "finished"}))
    return here.run()


@wrong("disk-full-settings", "The disk is full when the settings are written")
def _(here: Here) -> str:
    here.monkeypatch.setattr("align.run.folder.os.replace", full_disk)
    return here.run()


@wrong("disk-full-model", "The disk is full when a model is written")
def _(here: Here) -> str:
    def serialize(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    here.monkeypatch.setattr(HunYuanForCausalLM, "save_pretrained", serialize)
    return here.run(model={"kind": "scratch", "tokenizer": "./model", "config": SIZES})


@wrong("disk-full-metrics", "The disk is full when metrics are written")
def _(here: Here) -> None:
    if not Path("/dev/full").is_char_device():
        full_disk_file: Any = type("Full", (), {"write": full_disk, "close": lambda self: None})()
    else:
        full_disk_file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (closed below)
    writer = MetricsWriter(Path("run/sft/metrics.jsonl"))
    writer.close()
    writer._file = full_disk_file
    try:
        writer.write(1, {"loss": 1.0})
    finally:
        with contextlib.suppress(OSError):
            full_disk_file.close()


@wrong("disk-full-training", "The disk is full while a stage trains")
def _(here: Here) -> str:
    from align.recipes import sft

    here.monkeypatch.setattr(sft, "train_and_save", full_disk)
    return here.run()


@wrong("resume-ppo-without-parallel", "--resume without the parallel section that a PPO stage began with")
def _(here: Here) -> None:
    sharded = here.folder / "run" / "ppo" / "checkpoints" / "last" / "policy"
    sharded.mkdir(parents=True)
    (sharded / "state.json").write_text('{"processes": 2, "steps": 1}')
    LocalLearner(torch.nn.Linear(2, 1), Optimizer(), total=1).load(sharded)
