"""Bus bandwidth of an NCCL all-reduce over the GPUs of this machine."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

BYTES, ROUNDS = 2**30, 10


def all_reduce(count: int, folder: Path) -> float:
    """Bus bandwidth over n = `count` GPUs in GB/s: 2 (n - 1) / n times the buffer's size, divided by the time per call.

    This is the traffic of each GPU in one direction.
    """
    meeting, result = folder / "all-reduce", folder / "all-reduce.txt"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_rank, (count, meeting, result), nprocs=count)
    return 2 * (count - 1) / count * BYTES / float(result.read_text()) / 1e9


def _rank(rank: int, count: int, meeting: Path, result: Path) -> None:
    """Time the all-reduce as one of `count` ranks; rank 0 writes the seconds per call to `result`."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", f"file://{meeting}", world_size=count, rank=rank, device_id=device)
    buffer = torch.zeros(BYTES // 2, dtype=torch.bfloat16, device=device)
    for _ in range(2):
        dist.all_reduce(buffer)
    torch.cuda.synchronize()
    clock = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(buffer)
    torch.cuda.synchronize()
    if rank == 0:
        result.write_text(str((time.perf_counter() - clock) / ROUNDS))
    dist.destroy_process_group()
