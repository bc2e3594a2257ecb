"""Train LoRA adapters under several parallel settings; run on every rank by test_lora_ranks.py.

Needs torchrun's environment variables. The argument is the folder for `rank-0.json`.
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
from align.config.parallel import Offload, Parallel
from align.launch.ending import end_process
from align.models.lora.adapters import merge_lora
from align.parallel.deepspeed_config import deepspeed_config
from align.parallel.export import save_sharded_adapter, save_sharded_model
from align.parallel.group import quieten_deepspeed, start_deepspeed
from align.parallel.sharding import local_values
from align.parallel.state import load_training_state, save_training_state
from align.train.checkpoint import load_policy
from align.train.optimizer import build_optimizer
from tests.unit.parallel.ranks import MICROS, OPTIMIZER, STEPS, difference, micro_batch, model, train

LORA = Lora(rank=2, alpha=8.0, train_router=True)
FROZEN_EXPERTS = Lora(rank=2, experts=False)
READERS = ("zero 3, expert parallel 2", "zero 3", "zero 1")


def loaded(folder: Path, lora: Lora, parallel: Parallel | None = None, dtype: str = "float32") -> Any:
    torch.manual_seed(5)  # seed of the adapters
    return load_policy(folder, dtype, parallel, lora).train()


def alone(folder: Path, lora: Lora) -> dict[str, Any]:
    """Train PEFT's adapters in plain torch in this process, on all micro-batches, for the expected results."""
    net = loaded(folder, lora)
    optimizer = build_optimizer(net, OPTIMIZER)
    losses, norms = [], []
    for step in range(STEPS):
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


def engine(folder: Path, parallel: Parallel, lora: Lora = LORA, checkpointing: bool = False, **how: Any) -> Any:
    net = loaded(folder, lora, parallel, **how)
    if checkpointing:
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable()
    config = deepspeed_config(
        parallel,
        micro_batch_size=2,
        accumulation=MICROS // parallel.processes,
        max_grad_norm=OPTIMIZER.max_grad_norm,
        dtype=how.get("dtype", "float32"),
    )
    made, *_ = deepspeed.initialize(model=net, optimizer=build_optimizer(net, OPTIMIZER), config=config)
    return made


def exported(made: Any, folder: Path) -> None:
    for name, write in (
        ("adapter", lambda target: save_sharded_adapter(made.module, target)),
        ("model", lambda target: save_sharded_model(made.module, target, torch.float32)),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(folder / name)
    dist.barrier()


def against(folder: Path, net: Any, target: Path) -> dict[str, float]:
    """Largest differences from the files of a single process; infinite if a name or a shape differs."""
    net.save_pretrained(target / "adapter")
    merge_lora(net).save_pretrained(target / "model")
    found = {}
    for name in ("adapter", "model"):
        ours, theirs = (
            {key: value for file in (root / name).glob("*.safetensors") for key, value in load_file(file).items()}
            for root in (folder, target)
        )
        equal = {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in theirs.items()}
        found[name] = max((ours[k] - theirs[k]).abs().max().item() for k in ours) if equal else float("inf")
    configs = [json.loads((root / "adapter" / "adapter_config.json").read_text()) for root in (folder, target)]
    found["config"] = float(configs[0] != configs[1])
    return found


def local_sizes(made: Any) -> dict[str, int]:
    """Elements of frozen parameters, trained parameters and first moments on this rank; number of frozen gradients."""
    parameters = list(made.module.parameters())
    state = getattr(made.optimizer, "optimizer", made.optimizer).state
    return {
        "frozen": sum(local_values(p).numel() for p in parameters if not p.requires_grad),
        "trained": sum(local_values(p).numel() for p in parameters if p.requires_grad),
        "moments": sum(s["exp_avg"].numel() for s in state.values() if "exp_avg" in s),
        "frozen gradients": sum(p.grad is not None for p in parameters if not p.requires_grad),
    }


def main(out: Path) -> None:
    start_deepspeed("gloo")
    quieten_deepspeed()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    base = out / "base"
    if rank == 0:
        model().save_pretrained(base)
    dist.barrier()
    found: dict[str, Any] = {}
    witness = alone(base, LORA)
    expert_parallel = Parallel(processes=ranks, expert_parallel_size=2)
    settings = {
        "zero 3": Parallel(processes=ranks),
        "zero 3, expert parallel 2": expert_parallel,
        "zero 2, expert parallel 2": Parallel(processes=ranks, zero_stage=2, expert_parallel_size=2),
        "zero 1": Parallel(processes=ranks, zero_stage=1),
        "offload": Parallel(
            processes=ranks, expert_parallel_size=2, offload=Offload(optimizer="cpu", parameters="cpu")
        ),
    }
    for name, parallel in settings.items():
        made = engine(base, parallel)
        if parallel == expert_parallel:
            exported(made, out / "start")
        trained = train(made)
        found[name] = difference(trained, witness)
        found[f"local sizes, {name}"] = local_sizes(made)
        if parallel == expert_parallel:
            uninterrupted = trained
            exported(made, out / "end")
        made.destroy()
    if rank == 0:
        found["export at the start"] = against(out / "start", loaded(base, LORA), out / "start-alone")
        found["export at the end"] = against(out / "end", witness["model"], out / "end-alone")
    found["activation checkpointing"] = difference(train(engine(base, expert_parallel, checkpointing=True)), witness)
    low = train(engine(base, expert_parallel, dtype="bfloat16"))
    found["bf16"] = max(abs(a - b) / b for a, b in zip(low["losses"], witness["losses"], strict=True))

    half = STEPS // 2
    made = engine(base, expert_parallel)
    train(made, range(half))
    save_training_state(made, out / "state")
    for name in READERS:
        made = engine(base, settings[name])
        load_training_state(made, out / "state")
        again = train(made, range(half, STEPS))
        found[f"state read by {name}"] = difference(again, {key: uninterrupted[key][half:] for key in again})
    witness = alone(base, FROZEN_EXPERTS)
    for name in ("zero 3, expert parallel 2", "zero 2, expert parallel 2"):
        found[f"frozen experts, {name}"] = difference(train(engine(base, settings[name], FROZEN_EXPERTS)), witness)
    if rank == 0:
        (out / "rank-0.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
