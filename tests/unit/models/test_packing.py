"""Packed sequences against the same model run on each sequence separately."""

from __future__ import annotations

import pytest
import torch

from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.packing import SHORTEST, Packing
from tests.near import assert_near

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "moe_topk": 2,
    "num_shared_expert": 1,
    "cla_share_factor": 2,
    "router_aux_loss_coef": 0.0,
}
LENGTHS = {
    "several groups": [3, 17, 1, 9, 16, 1, 8],
    "all of one length": [6, 6, 6],
    "one sequence": [5],
    "single tokens": [1, 1, 1],
    "one group": [8, 7, 6],
    "two lengths": [4, 9, 4],
}


def build(**changes) -> HunYuanForCausalLM:
    torch.manual_seed(0)
    model = HunYuanForCausalLM(HunYuanConfig(**{**SIZES, **changes}))
    with torch.no_grad():  # norm weights of 1 would hide a norm that ignores its weight
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def tokens_of(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator) for length in lengths]


def read(model: HunYuanForCausalLM, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [N, D] of the packed sequences."""
    packing = Packing([len(ids) for ids in sequences])
    return model.model(input_ids=torch.cat(sequences)[None], packing=packing, use_cache=False).last_hidden_state[0]


def gradients(model: HunYuanForCausalLM, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a randomly weighted sum of the hidden states."""
    model.zero_grad()
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("changes", [{}, {"use_cla": False, "num_key_value_heads": 4}], ids=["shared", "own keys"])
def test_packed_sequences_equal_each_alone_in_values_and_gradients(case, changes) -> None:
    model, sequences = build(**changes), tokens_of(LENGTHS[case])
    alone = torch.cat([model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in sequences])
    packed = read(model, sequences)
    assert_near(packed, alone)
    expected, found = gradients(model, alone), gradients(model, packed)
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    for name, gradient in expected.items():
        # Some gradients cancel to zero up to rounding, such as that of the query weights for single tokens.
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, name


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    model, (first, second, third) = build(), tokens_of([7, 12, 4])
    before = read(model, [first, second, third])
    after = read(model, [first, (second + 1) % SIZES["vocab_size"], third])
    assert_near(after[:7], before[:7])
    assert_near(after[19:], before[19:])
    assert (after[7:19] - before[7:19]).abs().max() > 1e-2


def test_gradient_checkpointing_of_packed_sequences_is_exact() -> None:
    model, sequences = build().train(), tokens_of(LENGTHS["several groups"])
    plain = gradients(model, read(model, sequences))
    model.gradient_checkpointing_enable()
    again = gradients(model, read(model, sequences))
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_attention_pads_little() -> None:
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0))
    packing = Packing(lengths.tolist())
    assert packing.total == lengths.sum() <= len(packing._slots) < packing.total / SHORTEST


def test_attention_dropout_acts_in_training_and_keeps_the_mean() -> None:
    packing = Packing([2, 64])
    query, key = torch.zeros(1, 1, 66, 4), torch.zeros(1, 1, 66, 4)
    drawn = packing.attend(query, key, torch.ones(1, 1, 66, 4), scaling=1.0, dropout=0.5)[0, 2:, 0, 0]
    assert drawn.std() > 0.05
    assert drawn[8:].mean().item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_a_sequence_without_tokens_is_refused(lengths) -> None:
    with pytest.raises(ValueError, match="without tokens"):
        Packing(lengths)


def test_inputs_that_contradict_a_packing_are_refused() -> None:
    model, packing = build(), Packing([2, 3])
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="one row"):
        model.model(input_ids=ids[:, :4], packing=packing, use_cache=False)
    for beside in ({"attention_mask": torch.ones_like(ids)}, {"position_ids": torch.arange(5)[None]}):
        with pytest.raises(ValueError, match="neither a cache"):
            model.model(input_ids=ids, packing=packing, use_cache=False, **beside)
    with pytest.raises(ValueError, match="neither a cache"):
        model.model(input_ids=ids, packing=packing, use_cache=True)
