"""Train tiny adopted families with sharded experts; run on every rank by test_family_ranks.py.

Needs torchrun's environment variables. The arguments are the folder for `rank-0.json` and model types.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from align.config.lora import Lora
from align.config.parallel import Parallel
from align.config.parts import Optimizer
from align.launch.ending import end_process
from align.models.family import family, routed_layers
from align.models.lora.adapters import add_lora
from align.models.packing import Packing
from align.models.weights import published_weights
from align.parallel.deepspeed_config import deepspeed_config
from align.parallel.export import save_sharded_model
from align.parallel.group import start_deepspeed
from align.parallel.load import load_sharded
from align.run.refusals import zero_3_problem
from align.train.optimizer import build_optimizer
from tests.tiny_families import VOCABULARY, save_tiny, tiny_config

OPTIMIZER = Optimizer(learning_rate=1e-3, weight_decay=0.0, max_grad_norm=0.5, schedule="constant")
MICROS, STEPS = 2, 3
LORA = Lora(rank=2, train_router=True)


def loss_of(net: Any, step: int, number: int) -> torch.Tensor:
    """Mean negative log-probability of a packed row of three sequences, plus the balance loss."""
    generator = torch.Generator().manual_seed(10 * step + number)
    lengths = [7, 12, 9 + number]
    tokens = torch.randint(5, VOCABULARY, (sum(lengths),), generator=generator)
    packing = Packing(lengths)
    plain = net.get_base_model() if hasattr(net, "get_base_model") else net
    output = plain.model(input_ids=tokens[None], packing=packing, use_cache=False, output_router_logits=True)
    logprobs, *_ = plain.lm_head(output.last_hidden_state[0, :-1], tokens[1:], 1.0)
    loss = -logprobs.mean()
    return loss if output.router is None else loss + 0.05 * output.router.balance_loss


def alone(folder: Path, model_type: str, lora: Lora | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and published weights after the steps, in one process in plain torch."""
    net: Any = family(model_type).policy.from_pretrained(folder, dtype=torch.float32).eval()
    if lora is not None:
        torch.manual_seed(1)
        net = add_lora(net, lora, task="CAUSAL_LM")
    optimizer = build_optimizer(net, OPTIMIZER)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for number in range(MICROS):
            loss = loss_of(net, step, number) / MICROS
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: tensor.clone() for name, tensor in published_weights(net)}


def sharded(folder: Path, out: Path, model_type: str, lora: Lora | None) -> list[float]:
    """Losses of the same steps on all ranks; rank 0 writes the export to `out`."""
    routed = any(layer.experts > 1 for layer in routed_layers(tiny_config(model_type)))
    zero_stage: Any = 2 if zero_3_problem(model_type) else 3
    parallel = Parallel(processes=2, zero_stage=zero_stage, expert_parallel_size=2 if routed else 1)
    torch.manual_seed(1)
    config: Any = tiny_config(model_type)
    net = load_sharded(family(model_type).policy, config, folder, torch.float32, parallel, lora)
    settings = deepspeed_config(
        parallel, micro_batch_size=1, accumulation=1, max_grad_norm=OPTIMIZER.max_grad_norm, dtype="float32"
    )
    made, *_ = deepspeed.initialize(model=net, optimizer=build_optimizer(net, OPTIMIZER), config=settings)
    made.eval()
    losses = []
    for step in range(STEPS):
        loss = loss_of(made.module, step, dist.get_rank())
        made.backward(loss)
        made.step()
        total = loss.detach() / MICROS
        dist.all_reduce(total)
        losses.append(total.item())
    save_sharded_model(net, out, torch.float32)
    return losses


def main(folder: Path, model_types: list[str]) -> None:
    start_deepspeed("gloo")
    found: dict[str, dict[str, float]] = {}
    for model_type in model_types:
        source = folder / model_type
        if dist.get_rank() == 0:
            save_tiny(model_type, source)
        dist.barrier()
        for name, lora in (("full", None), ("lora", LORA)):
            out = folder / f"{model_type}-{name}"
            out.mkdir(exist_ok=True)
            losses = sharded(source, out, model_type, lora)
            if dist.get_rank() == 0:
                expected, weights = alone(source, model_type, lora)
                written = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
                before = load_file(source / "model.safetensors")
                assert written.keys() == weights.keys(), written.keys() ^ weights.keys()
                found[f"{model_type}, {name}"] = {
                    "losses": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
                    "weights": max((written[key] - weights[key]).abs().max().item() for key in weights),
                    "moved": max((written[key] - before[key]).abs().max().item() for key in weights),
                }
            dist.barrier()
    if dist.get_rank() == 0:
        (folder / "rank-0.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    end_process(0)
