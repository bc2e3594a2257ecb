"""The self-check ends a run whose sampler computes another model, and tolerates rounding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from align.errors import UserError
from align.rollout.self_check import TOKENS, SelfCheck

UPDATED = {"policy_updates": 2.0, "policy_grad_norm": 0.5}


def check(dtype: str = "float32", model_type: str = "llama", **config: object) -> SelfCheck:
    return SelfCheck(SimpleNamespace(model_type=model_type, **config), dtype, enabled=True)


def compared(check: SelfCheck, *differences: float) -> None:
    """Compare one completion whose log-probabilities differ by these values, followed by padding that differs more."""
    sampled = torch.full((2, len(differences)), -2.0)
    ours = sampled + torch.tensor([differences, [9.0] * len(differences)])
    mask = torch.tensor([[1.0] * len(differences), [0.0] * len(differences)])
    check.compare(ours, sampled, mask)


@pytest.mark.parametrize(("dtype", "tolerated", "refused"), [("float32", 9e-4, 2e-3), ("bfloat16", 0.9, 1.1)])
def test_the_limit_depends_on_the_dtype(dtype: str, tolerated: float, refused: float) -> None:
    compared(check(dtype), 0.0, -tolerated, tolerated)
    with pytest.raises(UserError, match=rf"another llama model .* up to {refused:.2g} \(limit"):
        compared(check(dtype), 0.0, -refused)


def test_one_token_in_bf16_may_differ_more() -> None:
    """A router's choice that rounding flips moves one of 48 tokens by 3 nats, and their mean by 0.06."""
    compared(check("bfloat16"), 3.0, *[0.0] * 47)
    with pytest.raises(UserError):
        compared(check("bfloat16"), 3.0, 2.0, *[0.0] * 46)
    with pytest.raises(UserError):
        compared(check("float32"), 3.0, *[0.0] * 47)


@pytest.mark.parametrize("place", [0, 500, 999])
def test_tokens_are_spread_over_the_batch(place: int) -> None:
    differences = torch.zeros(1000)
    differences[max(0, place - 20) : place + 20] = 1.0
    with pytest.raises(UserError, match=f"of {TOKENS} tokens"):
        compared(check(), *differences.tolist())


def test_a_batch_without_tokens_passes() -> None:
    check().compare(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def test_it_compares_at_the_start_and_after_the_first_update_that_changed_weights() -> None:
    checked = check()
    assert checked.pending
    compared(checked, 0.0)
    assert not checked.pending
    for metrics in ({"policy_updates": 0.0}, {"policy_updates": 1.0, "policy_grad_norm": 0.0}):
        checked.note_update(metrics)
        assert not checked.pending
    checked.note_update(UPDATED)
    assert checked.pending
    compared(checked, 0.0)
    checked.note_update(UPDATED)
    assert not checked.pending
    off = SelfCheck(SimpleNamespace(model_type="llama"), "float32", enabled=False)
    off.note_update(UPDATED)
    assert not off.pending


def test_the_likely_cause_is_the_familys() -> None:
    with pytest.raises(UserError, match=r"at the start: .* Likely cause: attention without sinks"):
        compared(check(model_type="gpt_oss"), 1.0)
    for config, kept in (
        ({"tie_word_embeddings": True}, "the output head"),
        ({"model_type": "gpt_oss", "num_experts_per_tok": 4}, "attention sinks or experts"),
        ({}, "some layers"),
    ):
        updated = check(**config)
        updated.note_update(UPDATED)
        with pytest.raises(UserError, match=f"after the first update: .* the engine kept old weights of {kept}"):
            compared(updated, 1.0)
