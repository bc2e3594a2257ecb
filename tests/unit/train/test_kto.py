"""KTO: mismatched completions, the loss of a step by hand and against TRL's trainer, the reference's cache."""

from __future__ import annotations

import json
import re
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from trl import KTOConfig, KTOTrainer

from align.config.recipe import Recipe
from align.models.hunyuan import HunYuanForCausalLM
from align.recipes import kto
from align.run.context import StageContext
from align.train import references
from align.train.kto import Completion, donors, mismatch
from tests.unit.train.one_step import build, checkpoint, gradient_of, mean_gradient_of_ranks, train_one_step
from tests.unit.train.test_first_steps import logprobs, mean

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- mismatched completions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([7, 3, 9, 5], [3, 0, 1, 2]),  # one before, as in TRL
        ([7], [-1]),
        ([7, 7], [-1, -1]),
        ([7, 7, 3, 3], [2, 3, 0, 1]),
        ([3, 7, 3, 7], [1, 0, 3, 2]),
        ([7, 3, 7, 7], [-1, 0, -1, 1]),  # in the order 7, 7, 7, 3; rotated by three
        ([], []),
    ],
)
def test_donors_by_hand(prompts: list[int], expected: list[int]) -> None:
    assert donors(prompts).tolist() == expected


def test_no_prompt_has_a_completion_of_its_own() -> None:
    """As many prompts as possible have a donor, and each completion is used at most once."""
    draw = np.random.default_rng(0)
    for _ in range(500):
        prompts = draw.integers(0, draw.integers(1, 8), draw.integers(1, 12))
        found = donors(prompts)
        used = found[found >= 0]
        assert len(set(used.tolist())) == len(used)
        assert (prompts[found >= 0] != prompts[used]).all()
        surplus = max(0, 2 * np.bincount(prompts).max() - len(prompts))
        assert len(prompts) - len(used) == surplus


def test_a_mismatched_completion_is_truncated() -> None:
    def completion(prompt: list[int], answer: list[int], masked: list[bool]) -> Completion:
        mask = torch.tensor([False] * len(prompt) + masked)
        return Completion((torch.tensor(prompt + answer),), (mask,), prompt=len(prompt))

    first = completion([1, 2, 3], [4], [True])
    second = completion([5], [6, 7, 8, 9], [True, False, True, True])
    for length, ids, mask in ((9, [1, 2, 3, 6, 7, 8, 9], "0001011"), (5, [1, 2, 3, 6, 7], "00010")):
        found = mismatch(first, second, length)
        assert found.ids[0].tolist() == ids
        assert found.masks[0].tolist() == [bit == "1" for bit in mask]
    assert mismatch(second, first, 9).ids[0].tolist() == [5, 4]


# --- one step ---------------------------------------------------------------------------------------------


def changed(trainer: Any, seed: int = 12) -> None:
    """Change the policy. With this seed the estimate of the KL is above 0, for full weights and for adapters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif trainer.align_stage.lora is None and name.endswith(("q_proj.weight", "o_proj.weight")):
                parameter.add_(0.05 * torch.randn_like(parameter))


def step_of(trainer: Any) -> list[Completion]:
    (step,) = trainer.get_train_dataloader()
    examples: list[Completion] = step["examples"]
    return examples


def log_ratio(policy: Any, reference: Any, prompt: list[int], completion: list[int]) -> float:
    both = [sum(logprobs(model, prompt + completion)[len(prompt) - 1 :]) for model in (policy, reference)]
    return both[0] - both[1]


def by_hand(trainer: Any, reference: Any, *, needs_kl: bool) -> tuple[float, float]:
    """(loss, estimate of the KL) of the epoch's only step, from single rows."""
    stage = trainer.align_stage
    rows = [trainer.train_dataset[example.number] for example in step_of(trainer)]
    kl = 0.0
    if needs_kl:
        others = [rows[-1], *rows[:-1]]
        pairs = zip(rows, others, strict=True)
        ratios = [log_ratio(trainer.model, reference, a["prompt_ids"], b["completion_ids"]) for a, b in pairs]
        kl = max(0.0, mean(ratios))
    losses = []
    for row in rows:
        ratio = log_ratio(trainer.model, reference, row["prompt_ids"], row["completion_ids"])
        desirable = row["label"] == [1]
        z = stage.beta * ((ratio - kl) if desirable else (kl - ratio))
        weight = stage.desirable_weight if desirable else stage.undesirable_weight
        losses.append(weight * (1 - 1 / (1 + exp(-z))))
    return mean(losses), kl


CASES = pytest.mark.parametrize(
    "stage",
    [
        pytest.param({}, id="one pass"),
        pytest.param({"micro_batch_tokens": 1, "loss_type": "apo_zero_unpaired"}, id="without KL"),
        pytest.param({"lora": {"rank": 2}, "micro_batch_tokens": 40}, id="lora, several passes"),
    ],
)


@CASES
def test_the_loss_of_a_step_by_hand(
    stage: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"beta": 0.7, "desirable_weight": 0.5, "undesirable_weight": 2.0, **stage}
    trainer = build("kto", model, tmp_path, monkeypatch, **settings)
    changed(trainer)
    reference = HunYuanForCausalLM.from_pretrained(model)
    loss, kl = by_hand(trainer, reference, needs_kl="loss_type" not in stage)
    logs = train_one_step(trainer).logs
    assert logs["loss"] == pytest.approx(loss, rel=2e-6)
    if "loss_type" in stage:
        assert "kto_kl" not in logs
    else:
        assert kl > 0.01  # otherwise the case shows nothing of the estimate
        assert logs["kto_kl"] == pytest.approx(kl, rel=1e-4)


def test_metrics_of_a_step_by_hand(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("kto", model, tmp_path, monkeypatch, beta=0.7, micro_batch_tokens=40)
    changed(trainer)
    reference = HunYuanForCausalLM.from_pretrained(model)
    rows = list(trainer.train_dataset)
    expected: dict[str, float] = {}
    for side, label in (("chosen", 1), ("rejected", 0)):
        own = [(row["prompt_ids"], row["completion_ids"]) for row in rows if row["label"] == [label]]
        expected[f"rewards/{side}"] = mean([0.7 * log_ratio(trainer.model, reference, *row) for row in own])
        expected[f"logps/{side}"] = mean([sum(logprobs(trainer.model, a + b)[len(a) - 1 :]) for a, b in own])
    expected["rewards/margins"] = expected["rewards/chosen"] - expected["rewards/rejected"]
    logs = train_one_step(trainer).logs
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value, rel=1e-4), name


def test_metrics_of_a_missing_label_are_left_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.train import one_step

    rows = one_step.rows
    monkeypatch.setattr(one_step, "rows", lambda kind: [{**row, "label": "true"} for row in rows(kind)])
    trainer = build("kto", model, tmp_path, monkeypatch, undesirable_weight=0)
    logs = train_one_step(trainer).logs
    assert "rewards/chosen" in logs
    assert not {"rewards/rejected", "logps/rejected", "logits/rejected", "rewards/margins"}.intersection(logs)


def test_equal_policies_have_the_loss_of_sigmoid_of_zero(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three desirable rows with weight 1 and two undesirable ones with weight 3: (3 / 2 + 2 * 3 / 2) / 5."""
    trainer = build("kto", model, tmp_path, monkeypatch, undesirable_weight=3.0)
    assert train_one_step(trainer).logs["loss"] == pytest.approx(0.9, rel=1e-6)


def test_the_estimate_does_not_depend_on_passes_or_ranks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five rows in one pass, in five, and in five on two ranks, one of which repeats a row that does not count."""
    trainers = []
    for number, tokens in enumerate((1000, 1, 1, 1)):
        folder = tmp_path / str(number)
        trainers.append(build("kto", model, folder, monkeypatch, beta=0.7, micro_batch_tokens=tokens))
        changed(trainers[-1])
    single, split = map(gradient_of, trainers[:2])
    estimates = [trainer._measured["kto_kl"].item() for trainer in trainers[:2]]
    several = mean_gradient_of_ranks(trainers[2:])
    estimates += [trainer._measured["kto_kl"].item() for trainer in trainers[2:]]
    assert estimates == pytest.approx([estimates[0]] * 4, rel=1e-5)
    assert estimates[0] > 0.5
    largest = max(gradient.abs().max().item() for gradient in single.values())
    for other in (split, several):
        for name, gradient in single.items():
            assert (other[name] - gradient).abs().max().item() < 2e-6 * largest, name


# --- TRL --------------------------------------------------------------------------------------------------


def of_trl(trainer: Any, reference: Any, folder: Path) -> tuple[float, dict[str, torch.Tensor], float]:
    """(loss, gradient, KL) of the step in TRL's trainer, as one padded batch in the same order."""
    from datasets import Dataset

    stage = trainer.align_stage
    rows = [dict(trainer.train_dataset[example.number]) for example in step_of(trainer)]
    for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        row["KL_completion_ids"] = other["completion_ids"]
    rows = [{**row, "label": row["label"] == [1]} for row in rows]
    names = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    rows = [{name: row[name] for name in names} for row in rows]
    config = KTOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=None,
        beta=stage.beta,
        loss_type=stage.loss_type,
        desirable_weight=stage.desirable_weight,
        undesirable_weight=stage.undesirable_weight,
        router_aux_loss_coef=0.0,
        gradient_checkpointing=False,
    )
    tokenised = type("Tokenised", (KTOTrainer,), {"_prepare_dataset": lambda self, dataset, *_, **__: dataset})
    theirs = tokenised(
        trainer.model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=trainer.processing_class,
    )
    theirs.model.zero_grad(set_to_none=True)
    result = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    result.backward()
    found = {name: p.grad.clone() for name, p in theirs.model.named_parameters() if p.grad is not None}
    return result.item(), found, theirs._metrics["train"]["kl"][-1]


@pytest.mark.parametrize("tokens", [1000, 1])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_step_has_the_loss_and_gradient_of_trls_trainer(
    loss_type: str, tokens: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    settings = {"beta": 0.7, "desirable_weight": 0.5, "undesirable_weight": 2.0, "loss_type": loss_type}
    trainer = build("kto", model, tmp_path, monkeypatch, micro_batch_tokens=tokens, **settings)
    changed(trainer, seed=12 if tolerance > 1e-7 else 7)  # the draws depend on the precision
    ours = gradient_of(trainer)
    (step,) = trainer.get_train_dataloader()
    loss = trainer.training_step(trainer.model, step).item()
    kl = trainer._measured.get("kto_kl", torch.tensor(0.0)).item()
    expected, theirs, their_kl = of_trl(trainer, HunYuanForCausalLM.from_pretrained(model), tmp_path / "trl")
    assert loss == pytest.approx(expected, rel=tolerance)
    assert kl == pytest.approx(their_kl, rel=5 * tolerance)
    assert (kl > 0.01) == (loss_type == "kto")
    assert ours.keys() == theirs.keys()
    whole = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm().item()
    for name, gradient in theirs.items():
        assert ours[name].dtype == gradient.dtype == torch.float32
        assert (ours[name] - gradient).norm().item() < tolerance * whole, name


# --- the reference's cache, held-out rows, the example of the page ------------------------------------------


def test_the_reference_is_computed_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run reads all values; another order of the rows computes the mismatched ones alone."""
    loads, computed, load = [], [], references.load_policy
    monkeypatch.setattr(references, "load_policy", lambda *a, **o: loads.append(a) or load(*a, **o))
    compute = references.Reference._computed

    def counted(self: Any, examples: Any, sequences: int) -> Any:
        computed.append(len(examples))
        return compute(self, examples, sequences)

    monkeypatch.setattr(references.Reference, "_computed", counted)
    settings = {"batch_size": 3, "max_steps": 4}  # two epochs of two steps
    first = build("kto", model, tmp_path / "first", monkeypatch, **settings)
    assert computed[0] == 5
    assert 5 < sum(computed) <= 15
    before = list(computed)
    again = build("kto", model, tmp_path / "again", monkeypatch, beta=0.7, **settings)
    assert computed == before
    assert len(loads) == 1
    np.testing.assert_array_equal(again.objective.references, first.objective.references)
    np.testing.assert_array_equal(again.objective.mismatched.logprobs_M, first.objective.mismatched.logprobs_M)
    build("kto", model, tmp_path / "more", monkeypatch, batch_size=4, max_steps=4)
    assert len(loads) == 2
    assert len(computed) == len(before) + 1


def test_every_step_of_two_epochs_has_its_values(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("kto", model, tmp_path, monkeypatch, batch_size=2, epochs=2.0, max_steps=None)
    trainer.train()
    assert trainer.state.global_step == 6
    plain, objective = HunYuanForCausalLM.from_pretrained(model), trainer.objective
    pairs = [divmod(int(pair), 5) for pair in objective.mismatched.pairs_M]
    rows = list(trainer.train_dataset)
    expected = [
        sum(logprobs(plain, rows[a]["prompt_ids"] + rows[b]["completion_ids"])[len(rows[a]["prompt_ids"]) - 1 :])
        for a, b in pairs
    ]
    np.testing.assert_allclose(objective.mismatched.logprobs_M, expected, rtol=1e-6)


def test_held_out_rows_are_one_step(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their metrics equal those of a training step on the same rows in the same order, whatever the batch size is."""
    rows = tmp_path / "rows.jsonl"
    data = {"train": [{"path": str(rows)}], "held_out": [{"path": str(rows)}], "max_length": 128}
    found = []
    for number, tokens in enumerate((1000, 1)):
        trainer = build(
            "kto", model, tmp_path, monkeypatch, data=data, batch_size=2 + number, beta=0.7, micro_batch_tokens=tokens
        )
        changed(trainer)
        found.append(trainer.evaluate())
    reference, held_out = HunYuanForCausalLM.from_pretrained(model), list(trainer.eval_dataset)
    ratios = [
        log_ratio(trainer.model, reference, row["prompt_ids"], held_out[number - 1]["completion_ids"])
        for number, row in enumerate(held_out)
    ]
    for metrics in found:
        assert metrics["eval_kto_kl"] == pytest.approx(max(0.0, mean(ratios)), rel=1e-4)
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)


def test_the_example_of_the_page(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of docs/training.md trains on labelled rows and pairs in one file."""
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    block = next(text for text in re.findall(r"```yaml\n(.*?)```", page, re.S) if text.startswith("kto:"))
    stage = yaml.safe_load(block)["kto"] | {"init_from": str(model), "max_steps": 2}
    stage["data"]["held_out_fraction"] = 0.2
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = [{"prompt": f"a {n}", "completion": "b c", "label": n % 3 > 0} for n in range(12)]
    rows += [{"prompt": f"b {n}", "chosen": "a", "rejected": "c d"} for n in range(12)]
    Path("feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"name": "t", "model": {"kind": "pretrained", "path": str(model)}, "stages": {"kto": stage}}
    recipe = Recipe.model_validate(values)
    said: list[str] = []
    context = StageContext(recipe, "kto", tmp_path / "run", say=said.append)
    result = kto.run(recipe.stages["kto"], context)
    assert {"eval_loss", "eval_kto_kl", "eval_rewards/margins"} <= result.metrics.keys()
    assert any("12 pairs trained as two rows each" in line for line in said)
    lines = [json.loads(line) for line in (tmp_path / "run/kto/metrics.jsonl").read_text().splitlines()]
    assert {"kto_kl", "rewards/chosen", "rewards/rejected"} <= lines[1].keys()
