"""Frozen weights that models of one process hold once: outputs and gradients are those of models on their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from align.config.lora import Lora
from align.models.family import family_of
from align.models.lora.adapters import AnyModel, plain_name
from align.models.shared_weights import SharedWeights
from align.train.checkpoint import load_policy, load_scorer, save_model
from tests.tiny_families import save_tiny

IDS = torch.randint(3, 500, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """A mixture of experts, and a scorer that was trained from it with LoRA on attention and merged."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_tiny("qwen3_moe", folder / "policy")
    scorer = load_scorer(folder / "policy", "float32", lora=Lora(rank=2, experts=False, train_router=False))
    move(scorer)
    save_model(scorer, _Tokenizer(), folder, "float32")
    return folder / "policy", folder / "model"


class _Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Save nothing: these models are called with ids."""


def move(model: AnyModel) -> None:
    """Give every trained parameter random values, the same for equal names."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            seed = sum(map(ord, name))
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(seed))


def storages(*models: AnyModel) -> int:
    """Bytes of all different tensors of the models."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_oss", "hy_v3"])
def test_a_model_is_the_one_that_from_pretrained_loads(tmp_path, model_type, dtype) -> None:
    save_tiny(model_type, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    policy = family_of(config).policy
    expected: AnyModel = policy.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    found = SharedWeights().load(policy, config, tmp_path, getattr(torch, dtype))
    wanted = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    values = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    assert {n: (v.dtype, v.shape) for n, v in values.items()} == {n: (v.dtype, v.shape) for n, v in wanted.items()}
    assert all(torch.equal(values[name], value) for name, value in wanted.items())
    assert torch.equal(found(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert not found.training


def test_only_what_the_merged_adapter_changed_is_held_twice(checkpoints) -> None:
    shared = SharedWeights()
    policy = load_policy(checkpoints[0], "float32", lora=Lora(rank=2, experts=False), shared=shared)
    critic = load_scorer(checkpoints[1], "float32", head_only=True, shared=shared)
    theirs = {plain_name(name): p.data_ptr() for name, p in policy.named_parameters() if not p.requires_grad}
    own = {name for name, p in critic.named_parameters() if p.data_ptr() != theirs.get(name)}
    assert own == {name for name in dict(critic.named_parameters()) if "_proj.weight" in name and "attn" in name} | {
        "score.weight"
    }
    assert shared.shared == sum(p.numel() for name, p in critic.named_parameters() if name not in own)
    alone = load_scorer(checkpoints[1], "float32", head_only=True)
    assert storages(policy, critic) == storages(policy) + sum(
        4 * dict(alone.named_parameters())[n].numel() for n in own
    )


def test_trained_weights_are_not_shared(checkpoints) -> None:
    shared = SharedWeights()
    policy = load_policy(checkpoints[0], "float32", shared=shared)
    reference = load_policy(checkpoints[0], "float32", frozen=True, shared=shared)
    critic = load_scorer(checkpoints[1], "float32", shared=shared)
    assert shared.shared == 0
    assert storages(policy, reference, critic) == storages(policy) + storages(reference) + storages(critic)
    assert all(p.requires_grad for p in (*policy.parameters(), *critic.parameters()))


def test_a_fresh_head_leaves_that_of_the_reward_model(checkpoints) -> None:
    shared = SharedWeights()
    reward = load_scorer(checkpoints[1], "float32", frozen=True, shared=shared)
    before = reward.score.weight.clone()
    critic = load_scorer(checkpoints[1], "float32", head_only=True, fresh_head=True, shared=shared)
    assert not critic.score.weight.any()
    assert critic.score.weight.requires_grad
    assert torch.equal(reward.score.weight, before)


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("experts", [False, True], ids=["attention", "experts"])
def test_roles_on_shared_weights_compute_as_models_of_their_own(checkpoints, experts, recompute) -> None:
    """Both backward passes run after both forward passes. With recomputed activations, a role switched on the shared
    modules would then compute with the other role's adapters."""
    lora = Lora(rank=2, experts=experts, train_router=experts, train_embeddings=experts)

    def build(shared: SharedWeights | None) -> dict[str, AnyModel]:
        models: dict[str, AnyModel] = {
            "reward": load_scorer(checkpoints[1], "float32", frozen=True, shared=shared),
            "policy": load_policy(checkpoints[0], "float32", lora=lora, shared=shared),
            "critic": load_scorer(checkpoints[1], "float32", lora=lora, shared=shared),
            "reference": load_policy(checkpoints[0], "float32", frozen=True, shared=shared),
        }
        for model in models.values():
            move(model)
            if recompute:
                model.gradient_checkpointing_enable()
            model.train(recompute)
        return models

    def outputs(models: dict[str, AnyModel]) -> dict[str, torch.Tensor]:
        found = {name: model(input_ids=IDS).logits for name, model in models.items()}
        (found["policy"].square().mean() + found["critic"].square().mean()).backward()
        return found

    shared = SharedWeights()
    together, apart = build(shared), build(None)
    assert storages(*together.values()) < 0.5 * storages(*apart.values())
    expected, found = outputs(apart), outputs(together)
    assert (found["policy"] - found["reference"]).abs().max() > 1e-3
    for role in apart:
        assert torch.equal(found[role], expected[role]), role
        gradients = dict(apart[role].named_parameters())
        for name, parameter in together[role].named_parameters():
            wanted = gradients[name].grad
            assert (parameter.grad is None) == (wanted is None), name
            assert wanted is None or torch.equal(parameter.grad, wanted), name
