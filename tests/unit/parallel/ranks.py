"""Train a small model under several parallel settings; run on every rank by test_expert_parallel.py.

Needs torchrun's environment variables. The argument is the folder for `rank-0.json`. With more ranks than parts of the
experts, only the settings run that replicate the experts.
"""

from __future__ import annotations

import contextlib
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

from align.config.parallel import Offload, Parallel
from align.config.parts import Optimizer
from align.launch.ending import end_process
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.weight_files import StoredTensor
from align.parallel.deepspeed_config import deepspeed_config
from align.parallel.experts import shard_experts
from align.parallel.export import save_sharded_model
from align.parallel.group import start_deepspeed
from align.parallel.load import load_sharded
from align.parallel.state import load_training_state, save_training_state
from align.train.optimizer import build_optimizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 8,
    "num_shared_expert": 1,
    "use_cla": True,
    "cla_share_factor": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.001,
    # Recycle routing: tokens over an expert's capacity go to a random expert with a free slot.
    "moe_topk": 1,
    "capacity_factor": 0.9,
    "moe_drop_tokens": True,
    "moe_random_routing_dropped_token": True,
}
OPTIMIZER = Optimizer(
    learning_rate=5e-3, expert_learning_rate_scale=0.4, weight_decay=0.1, max_grad_norm=0.5, schedule="constant"
)
MICROS, STEPS = 4, 4
"""Micro-batches per step, over all ranks; number of steps."""


READERS = ("zero 3, expert parallel 2", "zero 2, expert parallel 2", "zero 3", "offload")
"""Settings under which each rank loads its shard of a checkpoint."""


def model(**changes: Any) -> HunYuanForCausalLM:
    torch.manual_seed(0)
    return HunYuanForCausalLM(HunYuanConfig(**{**SIZES, **changes})).train()


def micro_batch(step: int, number: int) -> dict[str, torch.Tensor]:
    """Two sequences; the second has `number` padding tokens. Also seeds the random recycling of tokens."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(1, SIZES["vocab_size"], (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 12 - number % 5 :] = 0
    torch.manual_seed(77 * step + number)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def alone(steps: range = range(STEPS), **changes: Any) -> dict[str, Any]:
    """Train in plain torch in this process, on all micro-batches, for the expected results."""
    net = model(**changes)
    prepare(net, changes)
    optimizer = build_optimizer(net, OPTIMIZER)
    losses, norms = [], []
    for step in steps:
        total = 0.0
        for number in range(MICROS):
            loss = net(**micro_batch(step, number)).loss / MICROS
            loss.backward()
            total += loss.item()
        trained = [p for p in net.parameters() if p.requires_grad]
        norms.append(torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses, "norms": norms, "model": net}


def prepare(net: HunYuanForCausalLM, changes: dict[str, Any]) -> None:
    if changes.get("moe_drop_tokens") is False:
        # With equal scores every token goes to the same expert; the other seven get none.
        for layer in net.model.layers:
            layer.mlp.gate.weight.data.zero_()
            layer.mlp.gate.weight.requires_grad_(False)


def engine(parallel: Parallel, *, dtype: str = "float32", checkpointing: bool = False, **changes: Any) -> Any:
    net = model(**changes)
    prepare(net, changes)
    if checkpointing:
        net.gradient_checkpointing_enable()
    shard_experts(net, parallel.expert_parallel_size)
    config = deepspeed_config(
        parallel,
        micro_batch_size=2,
        accumulation=MICROS // parallel.processes,
        max_grad_norm=OPTIMIZER.max_grad_norm,
        dtype=dtype,
    )
    made, *_ = deepspeed.initialize(model=net, optimizer=build_optimizer(net, OPTIMIZER), config=config)
    return made


def train(made: Any, steps: range = range(STEPS)) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses, norms = [], []
    for step in steps:
        total = torch.zeros(())
        for number in range(rank, MICROS, ranks):
            loss = made(**micro_batch(step, number)).loss
            made.backward(loss)
            made.step()
            total += loss.detach().float() / MICROS
        dist.all_reduce(total)
        losses.append(total.item())
        norms.append(float(made.get_global_grad_norm() or 0.0))
    return {"losses": losses, "norms": norms}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest relative difference of losses and gradient norms."""
    pairs = [*zip(one["losses"], other["losses"], strict=True), *zip(one["norms"], other["norms"], strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def exported(made: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_sharded_model(made.module, folder, torch.float32)
    dist.barrier()


def against(folder: Path, net: HunYuanForCausalLM, target: Path) -> float:
    """Largest difference from the file that `save_pretrained` writes; infinite if the names differ."""
    net.save_pretrained(target)
    ours = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    theirs = load_file(target / "model.safetensors")
    if set(ours) != set(theirs):
        return float("inf")
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


def loaded(parallel: Parallel, folder: Path) -> tuple[Any, float]:
    """An engine whose ranks each loaded a shard of a checkpoint, and the fraction of its bytes that this rank read."""
    read: list[int] = []
    real = StoredTensor.read_into

    def counted(self: StoredTensor, target: torch.Tensor) -> None:
        read.append(target.nbytes)
        real(self, target)

    StoredTensor.read_into = counted
    try:
        net = load_sharded(HunYuanForCausalLM, HunYuanConfig.from_pretrained(folder), folder, torch.float32, parallel)
    finally:
        StoredTensor.read_into = real
    config = deepspeed_config(
        parallel,
        micro_batch_size=2,
        accumulation=MICROS // parallel.processes,
        max_grad_norm=OPTIMIZER.max_grad_norm,
        dtype="float32",
    )
    made, *_ = deepspeed.initialize(model=net.train(), optimizer=build_optimizer(net, OPTIMIZER), config=config)
    return made, sum(read) / sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(out: Path) -> None:
    start_deepspeed("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    witness = alone()
    settings = {
        "zero 3, expert parallel 2": Parallel(processes=ranks, expert_parallel_size=2),
        "zero 2, expert parallel 2": Parallel(processes=ranks, zero_stage=2, expert_parallel_size=2),
        "zero 1, expert parallel 2": Parallel(processes=ranks, zero_stage=1, expert_parallel_size=2),
    }
    replicated = ranks > 2
    if not replicated:
        settings |= {
            "zero 3": Parallel(processes=ranks),
            "offload": Parallel(
                processes=ranks, expert_parallel_size=2, offload=Offload(optimizer="cpu", parameters="cpu")
            ),
        }
    for name, parallel in settings.items():
        made = engine(parallel)
        if name == "zero 3, expert parallel 2":
            exported(made, out / "start")
            if rank == 0:
                found["export at the start"] = against(out / "start", model(), out / "start-plain")
        found[name] = difference(train(made), witness)
        if name == "zero 3, expert parallel 2":
            exported(made, out / "end")
            if rank == 0:
                found["export at the end"] = against(out / "end", witness["model"], out / "end-plain")
        made.destroy()
    expert_parallel = settings["zero 3, expert parallel 2"]
    idle = {"moe_drop_tokens": False}
    found["experts without tokens"] = difference(train(engine(expert_parallel, **idle)), alone(**idle))
    if not replicated:
        found["activation checkpointing"] = difference(train(engine(expert_parallel, checkpointing=True)), witness)
        low = train(engine(expert_parallel, dtype="bfloat16"))
        found["bf16"] = max(abs(a - b) / b for a, b in zip(low["losses"], witness["losses"], strict=True))

    half = STEPS // 2
    made = engine(expert_parallel)
    train(made, range(half))
    save_training_state(made, out / "state")
    rest = {key: witness[key][half:] for key in ("losses", "norms")}
    for name, parallel in settings.items():
        made = engine(parallel)
        load_training_state(made, out / "state")
        found[f"state read by {name}"] = difference(train(made, range(half, STEPS)), rest)
    for name in READERS if ranks == 2 else READERS[:2]:
        made, share = loaded(settings[name], out / "start")
        shares = torch.zeros(ranks)
        shares[rank] = share
        dist.all_reduce(shares)
        found[f"shares read for {name}"] = shares.tolist()
        found[f"loaded for {name}"] = difference(train(made), witness)
    if not replicated:
        found |= states_of_zero_0_to_2(out, settings["zero 3"], rest)
    if rank == 0:
        (out / "rank-0.json").write_text(json.dumps(found))


def states_of_zero_0_to_2(out: Path, zero_3: Parallel, rest: dict[str, Any]) -> dict[str, float]:
    """Differences after states are read at ZeRO stage 0, and after states of stages 1 and 2 are read."""
    found, ranks, half = dict[str, float](), zero_3.processes, STEPS // 2
    made = engine(Parallel(processes=ranks, zero_stage=0))
    load_training_state(made, out / "state")
    losses = train(made, range(half, STEPS))["losses"]  # at ZeRO stage 0 DeepSpeed reports no gradient norms
    found["state read by zero 0"] = max(abs(a - b) / b for a, b in zip(losses, rest["losses"], strict=True))
    for stage, dtype in ((2, "float32"), (1, "float32"), (2, "bfloat16"), (1, "bfloat16")):
        own = Parallel(processes=ranks, zero_stage=stage)
        folder = out / f"state-{stage}-{dtype}"
        made = engine(own, dtype=dtype)
        train(made, range(half))
        save_training_state(made, folder)
        uninterrupted = train(made, range(half, STEPS))
        for reader, parallel in {"itself": own, "zero 3": zero_3}.items():
            made = engine(parallel, dtype=dtype)
            load_training_state(made, folder)
            apart = difference(train(made, range(half, STEPS)), uninterrupted)
            found[f"state of zero {stage} in {dtype} read by {reader}"] = apart
    return found


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import logging

        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
    end_process(0)
