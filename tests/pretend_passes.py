"""One pass of every kind of training and scoring on a pretend GPU: forward, loss, backward and metrics of small models.

Used by the tests of placement and by `benchmarks/bench_launches.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from align.config.lora import Lora
from align.config.ppo import PpoStage
from align.data.experience import Experience, build_experience
from align.models.forward import sequence_scores
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM, HunYuanForSequenceClassification
from align.models.lora.adapters import add_lora
from align.models.lora.experts import adapt_by_row
from align.rl.complete import critic_pass, policy_pass, reference_pass
from align.rl.models import Models
from align.rl.update import BatchTotals, accumulate_gradients
from align.train.frozen import FrozenModel
from align.train.learner import LocalLearner
from tests.pretend_device import CUDA, Counted, PretendDevice
from tests.unit.rl.small import settings
from tests.unit.train import one_step

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_shared_expert": 1,
    "moe_topk": 2,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
    "max_position_embeddings": 512,
}
LENGTHS = ((5, 20), (9, 33), (3, 12), (6, 30))
"""(prompt, completion) tokens of each row."""
CAPACITY = {"moe_drop_tokens": True, "capacity_factor": 1.0, "moe_random_routing_dropped_token": True}
Run = Callable[[], Any]


def policy(dtype: torch.dtype, layers: int, **config: Any) -> HunYuanForCausalLM:
    torch.manual_seed(0)
    return HunYuanForCausalLM(HunYuanConfig(**SIZES, num_hidden_layers=layers, **config)).to(dtype).eval()


def scorer(dtype: torch.dtype, layers: int) -> HunYuanForSequenceClassification:
    torch.manual_seed(0)
    config = HunYuanConfig(**SIZES, num_hidden_layers=layers, num_labels=1)
    return HunYuanForSequenceClassification(config).to(dtype).eval()


def rollout(layers: int) -> Experience:
    """A complete rollout batch on the CPU, as the update gets it."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, SIZES["vocab_size"], (count,), generator=generator).tolist()

    batch = build_experience(
        [tokens(p) for p, _ in LENGTHS], [tokens(c) for _, c in LENGTHS], [[-5.5] * c for _, c in LENGTHS]
    )
    batch.old_logprobs = batch.ref_logprobs = batch.rollout_logprobs
    batch.advantages, batch.values, batch.returns = (
        torch.randn(batch.mask.shape, generator=generator) * batch.mask for _ in range(3)
    )
    routed = torch.rand(*batch.input_ids.shape, layers, SIZES["num_experts"], generator=generator).argsort(-1)
    batch.routed_experts = routed[..., : SIZES["moe_topk"]].to(torch.int16)
    return batch


def learner(device: PretendDevice, model: nn.Module, dtype: torch.dtype = torch.float32) -> LocalLearner:
    """dtype: computation dtype of the forward pass; bfloat16 means autocast."""
    name = str(dtype).removeprefix("torch.")
    return LocalLearner(device.module(model), settings().optimizer, total=1, dtype=name)


def update(device: PretendDevice, models: Models, stage: PpoStage, layers: int, *, train_policy: bool = True) -> Run:
    """The gradient of a mini-batch that is one micro-batch, with its metrics on the host."""
    batch, rows = rollout(layers), torch.arange(len(LENGTHS))
    totals = BatchTotals(
        tokens=batch.mask.sum().item(), completions=len(LENGTHS), all_tokens=batch.lengths.sum().item()
    )
    models.device = CUDA

    def run() -> dict[str, float]:
        for trained in models.learners.values():
            trained.discard()
        return accumulate_gradients(stage, models, batch, rows, totals, 0.1, train_policy=train_policy)

    return run


def policy_update(device: PretendDevice, model: nn.Module, layers: int, **stage: Any) -> Run:
    kl = {"apply_to": "loss", "estimator": "k3"}
    return update(device, Models(learner(device, model)), settings(kl=kl, **stage), layers)


def critic_update(device: PretendDevice, dtype: torch.dtype, layers: int) -> Run:
    idle = Models(LocalLearner(nn.Linear(1, 1), settings().optimizer, total=1))
    idle.critic = learner(device, scorer(dtype, layers))
    return update(device, idle, settings(), layers, train_policy=False)


def without_gradient(run: Run) -> Run:
    return torch.no_grad()(run)


def forward(device: PretendDevice, dtype: torch.dtype, layers: int, kind: str) -> Run:
    """The forward passes of PPO before the update, with their results on the host."""
    batch, stage = rollout(layers), settings(routing_replay="trainer")
    models = Models(learner(device, policy(dtype, layers)), device=CUDA)
    if kind == "policy":
        return without_gradient(lambda: policy_pass(models, stage, batch))
    if kind == "critic":
        critic = learner(device, scorer(dtype, layers))
        return without_gradient(lambda: critic_pass(models, critic, stage, batch))
    if kind == "reward":
        model = device.module(scorer(dtype, layers))
        return without_gradient(lambda: sequence_scores(model, batch.to(CUDA)).cpu())
    reference = FrozenModel(device.module(policy(dtype, layers)))
    return without_gradient(lambda: reference_pass(models, reference.run, stage, batch))


def adapted(dtype: torch.dtype, layers: int, *, experts: bool, by_row: bool = False) -> nn.Module:
    """A policy with adapters that change its output.

    experts: add adapters to the routed experts too. by_row: apply adapters by row, as under `parallel`.
    """
    model = add_lora(policy(dtype, layers), Lora(rank=8, experts=experts, train_router=True), task="CAUSAL_LM").eval()
    if by_row:
        adapt_by_row(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.to(dtype)


def with_capacity(dtype: torch.dtype, layers: int) -> nn.Module:
    """Expert capacity acts in training mode."""
    return policy(dtype, layers, **CAPACITY).train()


def trainer_step(device: PretendDevice, dtype: torch.dtype, layers: int, kind: str, **config: Any) -> Run:
    """A step of a trainer that is one packed pass, with its log."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        sizes = {key: size for key, size in SIZES.items() if key not in ("vocab_size", "router_aux_loss_coef")}
        patch.setattr(one_step, "SIZES", {**sizes, "num_hidden_layers": layers, **config})
        trainer = one_step.build(kind, one_step.checkpoint(folder / "model"), folder, patch)
        (step,) = trainer.get_train_dataloader()
    trainer.model.config.router_aux_loss_coef = SIZES["router_aux_loss_coef"]
    device.module(trainer.model.to(dtype))
    trainer.model.train()
    trainer.args.__dict__["_setup_devices"] = CUDA

    def run() -> None:
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, step)
        trainer.log({"loss": 0.0})

    return run


def autocast_update(device: PretendDevice, dtype: torch.dtype, layers: int) -> Run:
    """The policy's update without `parallel`: fp32 weights, and autocast in bf16."""
    return update(device, Models(learner(device, policy(torch.float32, layers), dtype)), settings(), layers)


PASSES: dict[str, Callable[[PretendDevice, torch.dtype, int], Run]] = {
    "policy update": lambda device, dtype, n: policy_update(device, policy(dtype, n), n),
    "policy update, routing replay": lambda device, dtype, n: policy_update(
        device, policy(dtype, n), n, routing_replay="trainer"
    ),
    "policy update, expert capacity": lambda device, dtype, n: policy_update(device, with_capacity(dtype, n), n),
    "policy update, LoRA": lambda device, dtype, n: policy_update(device, adapted(dtype, n, experts=False), n),
    "policy update, LoRA on experts": lambda device, dtype, n: policy_update(
        device, adapted(dtype, n, experts=True), n
    ),
    "policy update, LoRA on experts by row": lambda device, dtype, n: policy_update(
        device, adapted(dtype, n, experts=True, by_row=True), n
    ),
    "policy update, autocast": autocast_update,
    "critic update": critic_update,
    "policy, before the update": lambda device, dtype, n: forward(device, dtype, n, "policy"),
    "reference": lambda device, dtype, n: forward(device, dtype, n, "reference"),
    "critic, before the update": lambda device, dtype, n: forward(device, dtype, n, "critic"),
    "reward model": lambda device, dtype, n: forward(device, dtype, n, "reward"),
    "SFT": lambda device, dtype, n: trainer_step(device, dtype, n, "sft"),
    "SFT, expert capacity": lambda device, dtype, n: trainer_step(device, dtype, n, "sft", **CAPACITY),
    "DPO": lambda device, dtype, n: trainer_step(device, dtype, n, "dpo"),
}
"""Builders of passes: (device, dtype, layers) -> the pass."""
EXPERT_PARALLEL = "policy update, expert parallel"
"""A pass of `tests/unit/parallel/pretend_ranks.py`, on two ranks."""


def count(build: Callable[[PretendDevice, torch.dtype, int], Run], dtype: torch.dtype, layers: int) -> Counted:
    """Counts of the second run of a pass; the first one fills caches."""
    with PretendDevice() as device:
        run = build(device, dtype, layers)
        run()
        with device.counting() as counted:
            run()
    return counted
