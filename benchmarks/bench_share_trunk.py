"""PPO's models with and without shared frozen weights: peak memory and time of a step. Takes about four minutes.

A HunYuan model with random weights (hidden 512, 4 layers, 16 experts of width 1,024, float32), a policy and a critic
with adapters on attention, and a reward model whose adapters on attention were merged. A step is what PPO computes with
them: a forward pass of reference and reward model, forward and backward pass of critic and policy, on 4 rows of 256
tokens. Each measurement runs in its own process on one thread; the ways alternate.

    python benchmarks/bench_share_trunk.py
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent))
import harness
import torch
from bench_lora import SIZES

from align.config.lora import Lora
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.shared_weights import SharedWeights
from align.run.manifest import code_version
from align.train.checkpoint import load_policy, load_scorer

LORA = Lora(rank=8, experts=False, train_router=False)
WAYS = ("policy alone", "shared", "separate")
STEPS = 5
REPEATS = 3


def checkpoints(folder: Path) -> None:
    """Write the policy's checkpoint and that of a reward model whose attention differs."""
    torch.manual_seed(0)
    HunYuanForCausalLM(HunYuanConfig(**SIZES)).save_pretrained(folder / "policy")
    scorer: Any = load_scorer(folder / "policy", "float32")
    for name, parameter in scorer.named_parameters():
        if "attn" in name and name.endswith("proj.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    scorer.save_pretrained(folder / "reward")


def measure(way: str, folder: Path) -> dict[str, float]:
    """Peak memory above that of the imports, and CPU seconds of a step."""
    ids = torch.randint(3, SIZES["vocab_size"], (4, 256), generator=torch.Generator().manual_seed(0))
    gc.collect()
    with harness.PeakMemory() as memory:
        shared = SharedWeights() if way == "shared" else None
        policy: Any = load_policy(folder / "policy", "float32", lora=LORA, shared=shared)
        models = [policy]
        if way != "policy alone":
            critic: Any = load_scorer(folder / "reward", "float32", lora=LORA, fresh_head=True, shared=shared)
            reward: Any = load_scorer(folder / "reward", "float32", frozen=True, shared=shared)
            models.append(critic)
        seconds = []
        for _ in range(STEPS + 1):
            start = time.process_time()
            with torch.no_grad(), policy.disable_adapter():
                policy(input_ids=ids, use_cache=False)
            if way != "policy alone":
                with torch.no_grad():
                    reward(input_ids=ids, use_cache=False)
            for model in models:
                model(input_ids=ids, use_cache=False).logits.square().mean().backward()
            seconds.append(time.process_time() - start)
    return {"peak_mb": memory.bytes / 2**20, "cpu_seconds": statistics.median(seconds[1:])}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    version = code_version()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints(Path(folder))
        for turn in range(REPEATS):
            for way in WAYS[turn:] + WAYS[:turn]:
                found[way].append(harness.in_new_process(way, folder))
    medians = {
        way: {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        for way, runs in found.items()
    }
    alone, shared, separate = (medians[way] for way in WAYS)
    parameters = sum(p.numel() for p in HunYuanForCausalLM(HunYuanConfig(**SIZES)).parameters())
    results = {
        "parameters": parameters,
        "ways": medians,
        "peak_over_policy_alone": round(shared["peak_mb"] / alone["peak_mb"], 3),
        "separate_over_policy_alone": round(separate["peak_mb"] / alone["peak_mb"], 3),
        "cpu_seconds_over_separate": round(shared["cpu_seconds"] / separate["cpu_seconds"], 3),
    }
    harness.write("share_trunk", results, version=version)


if __name__ == "__main__":
    main()
