"""The loss of a stage's first step equals arithmetic on log-probabilities of single, unpadded rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p
from pathlib import Path
from typing import Any

import pytest
import torch

from align.models.hunyuan import HunYuanForCausalLM
from tests.unit.train.one_step import build, checkpoint, train_one_step

CASES = pytest.mark.parametrize(
    "stage",
    [
        pytest.param({}, id="one pass"),
        pytest.param({"micro_batch_tokens": 40}, id="several passes"),
        pytest.param({"lora": {"rank": 2}}, id="lora", marks=pytest.mark.slow),
        pytest.param({"lora": {"rank": 2}, "micro_batch_tokens": 40}, id="lora, several passes"),
    ],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def logprobs(model: Any, ids: Sequence[int]) -> list[float]:
    """log p(ids[t] | ids[:t]) for t > 0, from the plain logits of one row."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def completion_logprobs(model: Any, row: dict[str, Any], side: str) -> list[float]:
    return logprobs(model, row["prompt_ids"] + row[f"{side}_ids"])[len(row["prompt_ids"]) - 1 :]


def log_sigmoid(x: float) -> float:
    return -log1p(exp(-x))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def first_loss(trainer: Any) -> float:
    return train_one_step(trainer).logs["loss"]


@CASES
def test_sft(stage: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is minus the mean log-probability of the labelled tokens."""
    trainer, plain = build("sft", model, tmp_path, monkeypatch, **stage), HunYuanForCausalLM.from_pretrained(model)
    losses = [
        -logprob
        for row in trainer.train_dataset
        for logprob, label in zip(logprobs(plain, row["input_ids"]), row["labels"][1:], strict=True)
        if label != -100
    ]
    assert 5 < len(losses) < sum(len(row["input_ids"]) for row in trainer.train_dataset) - 5
    assert first_loss(trainer) == pytest.approx(mean(losses), rel=1e-6)


@pytest.mark.parametrize("attend_across", [True, False])
def test_pretraining(attend_across: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is minus the mean log-probability of all tokens given those before them in the row or the document."""
    settings = {"attend_across": attend_across, "micro_batch_tokens": 16}
    trainer = build("pretrain", model, tmp_path, monkeypatch, **settings)
    plain = HunYuanForCausalLM.from_pretrained(model)
    pieces = []
    for row in trainer.train_dataset:
        ids = torch.tensor(row["input_ids"])
        pieces += [ids] if attend_across else ids.split(row["documents"])
    losses = [-logprob for piece in pieces for logprob in logprobs(plain, piece.tolist())]
    assert len(pieces) == 5 if attend_across else len(pieces) > 7
    assert first_loss(trainer) == pytest.approx(mean(losses), rel=1e-6)


@CASES
def test_reward_model(stage: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is -log sigmoid(chosen - rejected) + center_coef * (chosen + rejected)^2 on last-token scores."""
    trainer = build("reward_model", model, tmp_path, monkeypatch, center_coef=0.3, **stage)
    head = next(p for n, p in trainer.model.named_parameters() if "score" in n and "original_module" not in n)
    trunk = HunYuanForCausalLM.from_pretrained(model).model

    @torch.no_grad()
    def score(ids: list[int]) -> float:
        return (head[0].double() @ trunk(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].double()).item()

    pairs = [(score(row["chosen_ids"]), score(row["rejected_ids"])) for row in trainer.train_dataset]
    assert max(abs(chosen + rejected) for chosen, rejected in pairs) > 0.01
    expected = mean([-log_sigmoid(chosen - rejected) + 0.3 * (chosen + rejected) ** 2 for chosen, rejected in pairs])
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-6)


@CASES
def test_dpo_of_equal_policies(
    stage: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is ln 2 minus sft_coef times the mean log-probability of all chosen tokens."""
    trainer, plain = (
        build("dpo", model, tmp_path, monkeypatch, sft_coef=0.5, **stage),
        HunYuanForCausalLM.from_pretrained(model),
    )
    chosen = [-logprob for row in trainer.train_dataset for logprob in completion_logprobs(plain, row, "chosen")]
    assert first_loss(trainer) == pytest.approx(log(2) + 0.5 * mean(chosen), rel=1e-6)


@CASES
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_dpo_after_a_change_of_the_policy(
    loss_type: str, stage: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is -log sigmoid(beta * (h(chosen) - h(rejected))), where h = log(pi / ref).

    For SimPO, h is the mean log-probability per token, and a margin of 0.5 is subtracted.
    """
    trainer = build("dpo", model, tmp_path, monkeypatch, beta=0.1, loss_type=loss_type, **stage)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or (not stage.get("lora") and name.endswith("q_proj.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    reference, losses = HunYuanForCausalLM.from_pretrained(model), []
    for row in trainer.train_dataset:
        if loss_type == "simpo":
            h = {side: mean(completion_logprobs(trainer.model, row, side)) for side in ("chosen", "rejected")}
            losses.append(-log_sigmoid(0.1 * (h["chosen"] - h["rejected"]) - 0.5))
        else:
            h = {
                side: sum(completion_logprobs(trainer.model, row, side))
                - sum(completion_logprobs(reference, row, side))
                for side in ("chosen", "rejected")
            }
            losses.append(-log_sigmoid(0.1 * (h["chosen"] - h["rejected"])))
    found = first_loss(trainer)
    assert abs(found - log(2)) > 0.01
    assert found == pytest.approx(mean(losses), rel=1e-6)
