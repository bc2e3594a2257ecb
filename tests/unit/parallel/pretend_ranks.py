"""Count the operations of policy updates with expert parallelism on a pretend GPU, on each of two ranks.

Run by tests/unit/test_placement.py and benchmarks/bench_launches.py. Needs torchrun's environment variables. The
argument is the folder for `rank-0.json` and `rank-1.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from align.launch.ending import end_process
from align.parallel.experts import shard_experts
from align.parallel.group import quieten_deepspeed, start_deepspeed
from tests.pretend_device import PretendDevice
from tests.pretend_passes import Run, count, policy, policy_update

RANKS = 2
PASSES = [(dtype, layers) for dtype in ("bfloat16", "float32") for layers in (2, 4)]


def update(device: PretendDevice, dtype: torch.dtype, layers: int) -> Run:
    model = policy(dtype, layers)
    shard_experts(model, RANKS)
    return policy_update(device, model, layers)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    quieten_deepspeed()
    start_deepspeed("gloo")
    found: list[dict[str, Any]] = []
    for dtype, layers in PASSES:
        counted = count(update, getattr(torch, dtype), layers)
        places = {
            kind: [f"{name} at {place}: {n}" for (name, place), n in getattr(counted, kind).items()]
            for kind in ("mixes", "syncs")
        }
        found.append({"dtype": dtype, "layers": layers, **places, "totals": counted.totals()})
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
