"""The environment of a process that runs stages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from align.config import load_recipe
from align.run import environment

VARIABLES = ("DS_ACCELERATOR", "TQDM_DISABLE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL")


@pytest.mark.parametrize(
    ("files", "accelerator"),
    [
        (["nvidia0", "nvidiactl"], None),
        (["nvidia3", "nvidiactl", "nvidia-uvm"], None),  # a container with one GPU of several
        (["nvidia11"], None),
        (["dxg"], None),
        (["nvidiactl", "nvidia-uvm", "null"], "cpu"),
        ([], "cpu"),
    ],
)
def test_deepspeed_computes_on_the_cpu_only_without_a_gpu(
    files: list[str], accelerator: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the variable afterwards
        monkeypatch.delenv(name)
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(environment, "DEVICES", tmp_path)
    environment.prepare_process(load_recipe("tiny", []))
    assert os.environ.get("DS_ACCELERATOR") == accelerator


@pytest.mark.parametrize(("verbose", "level"), [("", "ERROR"), ("1", None)])
def test_warnings_of_torch_are_shown_if_wanted(
    verbose: str, level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("ALIGN_VERBOSE", verbose)
    environment.prepare_process(load_recipe("tiny", []))
    assert os.environ.get("TORCH_CPP_LOG_LEVEL") == level
