"""Gathering a sharded parameter on rank 0."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from align.parallel import export
from align.parallel.sharding import Shard


def test_a_rank_does_not_run_ahead_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's send is asynchronous. Ranks wait for it, so that copies do not pile up and sends do not time out."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("waited"))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, where: seen.append(where) or tensor)
    monkeypatch.setattr(dist, "send", lambda tensor, dst: seen.append(f"sent {len(tensor)} to {dst}"))
    monkeypatch.setattr(export, "shards", lambda parameter: [Shard(0, 0, 3), Shard(1, 3, 2)])
    for _ in range(2):
        export.gather(nn.Parameter(torch.zeros(5)), torch.bfloat16, rank=1)
    assert seen == [torch.bfloat16, "cuda", "sent 2 to 0", "waited"] * 2
