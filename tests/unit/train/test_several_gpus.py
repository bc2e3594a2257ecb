"""A run without `parallel` on a machine with several GPUs. torch.cuda is patched to report GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align import pipeline
from align.train import references
from align.train.device import one_of_several_gpus
from tests.unit.train.one_step import build, checkpoint, prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


@pytest.mark.parametrize("kind", ["sft", "reward_model", "dpo"])
def test_trl_accepts_several_visible_gpus(kind: str, model: Path, tmp_path: Path, monkeypatch, four_gpus) -> None:
    """TRL's trainers refuse nn.DataParallel, which transformers would use on four GPUs."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    # The log-probabilities of DPO's reference are computed before the trainer exists, here on the CPU.
    monkeypatch.setattr(references, "training_device", lambda: torch.device("cpu"))
    trainer = build(kind, model, tmp_path, monkeypatch)
    assert (trainer.args.n_gpu, trainer.args.device) == (1, torch.device("cuda", 0))
    assert trainer._wrap_model(trainer.model) is trainer.model
    assert trainer._train_batch_size == 6


def test_a_run_says_which_gpu_it_uses(model: Path, tmp_path: Path, monkeypatch, four_gpus) -> None:
    _, recipe = prepare("sft", model, tmp_path)
    said: list[str] = []
    monkeypatch.setattr(pipeline, "_run_stage", lambda context: None)
    pipeline.run(recipe, tmp_path / "run", say=said.append)
    assert said == [one_of_several_gpus()]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipeline.run(recipe, tmp_path / "run", say=said.append)
    assert len(said) == 1


def test_the_gpu_in_use_is_named(monkeypatch: pytest.MonkeyPatch, four_gpus) -> None:
    said = "GPU {} (NVIDIA H200) trains, the first of 4 visible GPUs; --nproc 4 uses all of them"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert one_of_several_gpus() == said.format("0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,1,2,7")
    assert one_of_several_gpus() == said.format("5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert one_of_several_gpus() is None
