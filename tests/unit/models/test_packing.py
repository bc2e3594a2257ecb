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


SHARED = {
    "pairs": ([9, 7, 4, 12, 6, 6], [0, 5, 0, 3, 0, 0]),
    "all but one": ([5, 5], [0, 4]),
    "the whole first sequence": ([3, 8], [0, 3]),
}


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("changes", [{}, {"use_cla": False, "num_key_value_heads": 4}], ids=["shared", "own keys"])
def test_a_shared_start_equals_two_whole_sequences(case: str, changes: dict) -> None:
    """Hidden states of both sequences and gradients, where a token in two sequences has the sum of two gradients."""
    lengths, shared = SHARED[case]
    model, sequences = build(**changes), tokens_of(lengths)
    for number, common in enumerate(shared):
        sequences[number][:common] = sequences[number - 1][:common]
    row = torch.cat([ids[common:] for ids, common in zip(sequences, shared, strict=True)])
    packing = Packing(lengths, shared=shared)
    states = model.model(input_ids=row[None], packing=packing, use_cache=False).last_hidden_state[0]
    indices = [packing.token_at(torch.tensor(number), torch.arange(length)) for number, length in enumerate(lengths)]
    found = states[torch.cat(indices)]
    alone = torch.cat([model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in sequences])
    assert_near(found, alone)
    assert torch.equal(row[torch.cat(indices)], torch.cat(sequences))
    assert packing.last_S.tolist() == [index[-1].item() for index in indices]
    expected, own = gradients(model, alone), gradients(model, found)
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    for name, gradient in expected.items():
        assert (own[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, name


def test_a_shared_token_counts_twice_in_the_routers_report() -> None:
    """The report of two whole sequences equals that of the same sequences with a shared start."""
    model, (first, second) = build(), tokens_of([9, 7])
    second[:5] = first[:5]
    options = {"use_cache": False, "output_router_logits": True}
    whole = model.model(input_ids=torch.cat([first, second])[None], packing=Packing([9, 7]), **options).router
    packing = Packing([9, 7], shared=[0, 5])
    assert packing.counts_N.tolist() == [2.0] * 5 + [1.0] * 6
    report = model.model(input_ids=torch.cat([first, second[5:]])[None], packing=packing, **options).router
    for name in ("balance_loss", "z_loss", "entropy"):
        torch.testing.assert_close(getattr(report, name), getattr(whole, name), rtol=1e-5, atol=0)
    for found, expected in zip(report.load, whole.load, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("lengths", "shared"), [([4], [2]), ([4, 3], [0, 3]), ([2, 5], [0, 3]), ([4, 4, 4], [0, 2, 2]), ([4, 4], [0, -1])]
)
def test_impossible_shared_starts_are_refused(lengths: list[int], shared: list[int]) -> None:
    with pytest.raises(ValueError, match="sequence"):
        Packing(lengths, shared=shared)


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
