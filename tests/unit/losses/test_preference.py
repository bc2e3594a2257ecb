"""Preference losses against hand-computed values, and against TRL's trainers on the same numbers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import defaultdict
from math import exp, log, sqrt
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from align.config.stages import LOSS_OPTIONS, WHOLE_BATCH, WITHOUT_REFERENCE, DpoStage, LossType
from align.losses.preference import (
    PREFERENCE_LOSSES,
    bradley_terry_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    preference_loss,
    sft_loss,
    simpo_loss,
)

LN3 = log(3)
BY_TRL = sorted(set(PREFERENCE_LOSSES) - {"simpo"})


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(**changes: Tensor) -> dict[str, Tensor]:
    """Two pairs. With beta 1/2 the rewards (chosen, rejected) are (ln 3, 0) and (0, ln 3).

    The sigmoid of ln 3 is 3/4, of 0 it is 1/2, and of -ln 3 it is 1/4.
    """
    return {
        "chosen_logprobs_B": double(2 * LN3 - 9, 2 * LN3 - 9),
        "rejected_logprobs_B": double(-9, 2 * LN3 - 9),
        "ref_chosen_logprobs_B": double(-9, 2 * LN3 - 9),
        "ref_rejected_logprobs_B": double(-9, -9),
        "chosen_tokens_B": double(2, 2),
        "rejected_tokens_B": double(4, 4),
        **changes,
    }


BY_HAND = {
    "sigmoid": ({}, (log(4 / 3) + log(4)) / 2),
    "sigmoid_norm": ({}, (log(1 + 1 / sqrt(3)) + log(1 + 3**0.25)) / 2),
    "hinge": ({}, (0 + 1 + LN3) / 2),
    "ipo": ({}, ((LN3 - 1) ** 2 + (-LN3 / 2 - 1) ** 2) / 2),
    "robust": ({"label_smoothing": 0.25}, (1.5 * log(4 / 3) - 0.5 * log(4) + 1.5 * log(4) - 0.5 * log(4 / 3)) / 2),
    "exo_pair": ({"label_smoothing": 0.25}, (0 + 0.5 * LN3) / 2),
    "nca_pair": ({}, (log(4 / 3) + 0.5 * log(4) + 0.5 * log(2) + log(2) + 0.5 * log(2) + 0.5 * log(4)) / 2),
    "bco_pair": ({}, (log(4 / 3) + log(2) + log(2) + log(4)) / 2),
    "sppo_hard": ({}, ((2 * LN3 - 1) ** 2 + 1 + 1 + (2 * LN3 + 1) ** 2) / 2),
    "apo_zero": ({}, (0.75 + 1.25) / 2),
    "apo_down": ({}, (1 + 1.25) / 2),
    "discopop": ({"discopop_tau": 0.5}, (0.1 * log(4 / 3) + 0.9 / 3 + 0.9 * log(4) + 0.1 * 3) / 2),
    # Sorted, both sides are (0, 2 ln 3), so all differences are 0.
    "aot": ({"label_smoothing": 0.25}, log(2)),
    "aot_unpaired": ({"label_smoothing": 0.25}, log(2)),
    # beta * logprobs / tokens: (ln 3 - 4.5) / 2 and -9 / 8, then (ln 3 - 4.5) / 2 and (2 ln 3 - 9) / 8.
    "simpo": ({"simpo_gamma": LN3 / 2 - 1.125}, (log(2) + log(1 + 3**0.25)) / 2),
}


@pytest.mark.parametrize("loss_type", BY_HAND)
def test_the_loss_by_hand(loss_type: str) -> None:
    options, expected = BY_HAND[loss_type]
    loss, metrics = preference_loss(loss_type, pairs(), {"beta": 0.5, **options})
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["rewards/accuracies"].item() == (0 if loss_type == "simpo" else 0.5)
    if loss_type not in WITHOUT_REFERENCE:
        assert metrics["rewards/chosen"].item() == pytest.approx(LN3 / 2, rel=1e-6)
        assert metrics["rewards/rejected"].item() == pytest.approx(LN3 / 2, rel=1e-6)


def test_sorting_has_an_effect_where_the_policys_margins_are_higher() -> None:
    """The sorted sides are (0, 4 ln 3) and (0, 2 ln 3), so beta times their differences is 0 and ln 3."""
    tensors = pairs(chosen_logprobs_B=double(4 * LN3 - 9, 2 * LN3 - 9))
    smoothed = 0.75 * log(4 / 3) + 0.25 * log(4)
    for loss_type in ("aot", "aot_unpaired"):
        loss, _ = preference_loss(loss_type, tensors, {"beta": 0.5, "label_smoothing": 0.25})
        assert loss.item() == pytest.approx((log(2) + smoothed) / 2, rel=1e-12)


def test_equal_policies_lose_ln_2() -> None:
    at = double(-3, -40, -7.5)
    assert dpo_loss(at, at - 5, at, at - 5, beta=0.1)[0].item() == pytest.approx(log(2), rel=1e-15)


@pytest.mark.parametrize("loss_type", [name for name in PREFERENCE_LOSSES if name not in WHOLE_BATCH])
def test_micro_batches_add_up_to_the_steps_mean(loss_type: str) -> None:
    options = {"beta": 0.3, **LOSS_OPTIONS.get(loss_type, {})}
    whole, _ = preference_loss(loss_type, pairs(), options)
    parts = [
        preference_loss(loss_type, {k: v[i : i + 1] for k, v in pairs().items()}, {**options, "count": 2})[0]
        for i in range(2)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def trl_stub(**attributes: Any) -> SimpleNamespace:
    """Stand-in for `self` in a TRL trainer's loss method: one process, and a model without weights."""
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda t: t, gather=lambda t: t)
    model = SimpleNamespace(training=True)
    values = {"accelerator": accelerator, "model": model, "_metrics": defaultdict(lambda: defaultdict(list))}
    return SimpleNamespace(**values, _total_train_tokens=0, _tp_size=1, aux_loss_enabled=False, **attributes)


def completions(rows: int, tokens: int) -> tuple[dict[str, Tensor], SimpleNamespace]:
    """A TRL trainer's inputs and a model's outputs: log-probabilities [rows, tokens - 1], 0 outside the completions."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(rows, tokens, dtype=torch.long)
    for row in range(rows):
        mask[row, 2 : tokens - row % 3] = 1
    log_probs = torch.randn(rows, tokens - 1, generator=generator, dtype=torch.float64) * mask[:, 1:]
    outputs = SimpleNamespace(
        log_probs=log_probs.requires_grad_(),
        entropy=torch.zeros(rows, tokens - 1),
        mean_logits=torch.zeros(rows, tokens - 1),
        is_top1=torch.zeros(rows, tokens - 1, dtype=torch.bool),
    )
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return inputs, outputs


@pytest.mark.parametrize("loss_type", [*BY_TRL, "sft"])
def test_the_loss_and_its_gradient_are_trls(loss_type: str) -> None:
    from trl import DPOTrainer

    inputs, outputs = completions(8, 9)
    generator = torch.Generator().manual_seed(4)
    ref_chosen, ref_rejected = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    options = {
        "beta": 0.7,
        **({"label_smoothing": 0.2} if "label_smoothing" in LOSS_OPTIONS.get(loss_type, {}) else {}),
    }
    if loss_type == "discopop":
        options["discopop_tau"] = 0.4
    trainer = trl_stub(
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau")),
    )
    references = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, {**inputs, **references}, False)
    chosen, rejected = outputs.log_probs.sum(1).chunk(2)
    chosen_tokens, rejected_tokens = inputs["completion_mask"].sum(1).chunk(2)
    if loss_type == "sft":
        ours, metrics = sft_loss(outputs.log_probs[:4], inputs["completion_mask"][:4, 1:])
    else:
        tensors = {
            "chosen_logprobs_B": chosen,
            "rejected_logprobs_B": rejected,
            "ref_chosen_logprobs_B": ref_chosen,
            "ref_rejected_logprobs_B": ref_rejected,
            "chosen_tokens_B": chosen_tokens,
            "rejected_tokens_B": rejected_tokens,
        }
        ours, metrics = preference_loss(loss_type, tensors, options)
    # TRL computes the logarithms of EXO's label smoothing in float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-7 if loss_type == "exo_pair" else 1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, outputs.log_probs, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6 if loss_type == "exo_pair" else 1e-10, atol=1e-9)
    for name, value in metrics.items():
        assert value.item() == pytest.approx(trainer._metrics["train"][name][0], rel=1e-6), name


def test_simpo_is_trls_on_mean_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = double(-3, -20, -7), double(-6, -11, -2)
    chosen_tokens, rejected_tokens = double(2, 5, 4), double(3, 2, 1)
    trainer = trl_stub(loss_type="simpo", simpo_gamma=0.8, beta=2.5, label_smoothing=0.0, alpha=0.0)
    theirs, chosen_rewards, _ = CPOTrainer.cpo_loss(trainer, chosen / chosen_tokens, rejected / rejected_tokens)
    ours, metrics = simpo_loss(chosen, rejected, chosen_tokens, rejected_tokens, beta=2.5, simpo_gamma=0.8)
    assert ours.item() == pytest.approx(theirs.mean().item(), rel=1e-12)
    assert metrics["rewards/chosen"].item() == pytest.approx(chosen_rewards.mean().item(), rel=1e-6)


def test_bradley_terry_by_hand_and_by_trl() -> None:
    from trl import RewardTrainer

    chosen, rejected = double(LN3, 0), double(0, LN3)
    plain, metrics = bradley_terry_loss(chosen, rejected)
    assert plain.item() == pytest.approx((log(4 / 3) + log(4)) / 2, rel=1e-12)
    assert (metrics["accuracy"].item(), metrics["margin"].item()) == (0.5, 0.0)
    assert bradley_terry_loss(double(1, 2), double(1, 1))[1]["accuracy"].item() == 0.5  # a tie is not correct
    centred, _ = bradley_terry_loss(chosen, rejected, center_coef=0.1)
    assert centred.item() == pytest.approx(plain.item() + 0.1 * LN3**2, rel=1e-12)
    unequal, _ = bradley_terry_loss(double(2), double(1), center_coef=0.1)
    assert unequal.item() == pytest.approx(log(1 + exp(-1)) + 0.1 * (2 + 1) ** 2, rel=1e-12)
    halves = [bradley_terry_loss(chosen[[i]], rejected[[i]], center_coef=0.1, count=2)[0].item() for i in range(2)]
    assert sum(halves) == pytest.approx(centred.item(), rel=1e-12)
    margins = double(LN3, -LN3)
    with_margins, _ = bradley_terry_loss(chosen, rejected, margins_B=margins, center_coef=0.1)
    assert with_margins.item() == pytest.approx(log(2) + 0.1 * LN3**2, rel=1e-12)
    trainer = trl_stub(args=SimpleNamespace(center_rewards_coefficient=0.1))
    outputs = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    inputs = {"margin": margins, "attention_mask": torch.ones(4, 3)}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    assert with_margins.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_kto_by_hand() -> None:
    """The rewards are ln 3. With beta * KL = 0 the sigmoids are 3/4 and 1/4; with beta * KL = ln 3 both are 1/2."""
    logprobs, reference, desirable = double(2 * LN3, 2 * LN3), double(0, 0), torch.tensor([True, False])
    loss, metrics = kto_loss(logprobs, reference, desirable, double(0)[0], beta=0.5)
    assert loss.item() == pytest.approx((0.25 + 0.75) / 2, rel=1e-12)
    assert metrics["reward"].item() == pytest.approx(LN3, rel=1e-6)
    options = {"beta": 0.5, "desirable_weight": 3.0, "undesirable_weight": 5.0}
    loss, _ = kto_loss(logprobs, reference, desirable, double(0)[0], **options, count=4)
    assert loss.item() == pytest.approx((3 * 0.25 + 5 * 0.75) / 4, rel=1e-12)
    loss, _ = kto_loss(logprobs, reference, desirable, double(2 * LN3)[0], **options)
    assert loss.item() == pytest.approx((3 * 0.5 + 5 * 0.5) / 2, rel=1e-12)
    assert kto_kl(double(-1, -2), double(-2, -2)).item() == 0.5
    assert kto_kl(double(-3, -2), double(-2, -2)).item() == 0
    assert not kto_kl(double(-1, -2).requires_grad_(), double(-2, -2)).requires_grad


def test_kto_is_trls() -> None:
    from trl import KTOTrainer

    inputs, outputs = completions(5, 9)
    reference = torch.randn(5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mismatched, ref_mismatched = double(-3, -4, -5, -6, -7), double(-5, -4, -3, -6, -8)
    labels = torch.tensor([1, 0, 0, 1, 1]).bool()
    trainer = trl_stub(
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.6,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: mismatched,
    )
    given = {**inputs, "label": labels, "ref_logps": reference, "ref_KL_logps": ref_mismatched}
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: outputs, given, False)
    kl = kto_kl(mismatched, ref_mismatched)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    ours, metrics = kto_loss(outputs.log_probs.sum(1), reference, labels, kl, beta=0.6, **weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert metrics["kl"].item() == trainer._metrics["train"]["kl"][0] > 0
    gradients = [torch.autograd.grad(loss, outputs.log_probs, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_the_recipe_and_the_registry_know_the_same_losses_and_options() -> None:
    assert sorted(get_args(LossType)) == sorted(PREFERENCE_LOSSES)
    for name, function in PREFERENCE_LOSSES.items():
        parameters = inspect.signature(function).parameters.values()
        options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"beta", "count"}
        assert options == set(LOSS_OPTIONS.get(name, {})), name
        assert options <= set(DpoStage.model_fields), name
        assert any(p.name.startswith("ref_") for p in parameters) == (name not in WITHOUT_REFERENCE), name


def test_the_losses_load_torch_alone() -> None:
    heavy = "('transformers', 'trl', 'datasets', 'accelerate', 'peft', 'align.config')"
    code = f"import sys, align.losses.preference; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
