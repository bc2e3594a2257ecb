"""Sending side of vLLM's CUDA IPC, for rank 0 alone."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine


class RankZeroIpc(IPCTrainerWeightTransferEngine):
    """vLLM's sender without collectives.

    vLLM's own sender must be called by every rank of the default process group: it all-gathers the ranks' memory
    handles and ends each chunk with a barrier. Here the other ranks are gathering weights at that time and would never
    join. The only server is on rank 0's GPU and needs only rank 0's handle.
    """

    def send_weights(self) -> None:
        # vLLM refuses a tensor that is larger than the buffer, so the buffer holds the whole bucket.
        source: Any = self.source
        self.packed_buffer_size_bytes = sum(tensor.nbytes for _, tensor in source.iter_full())
        super().send_weights()

    def _all_gather_and_merge_handles(self, handles: list[dict[str, tuple]]) -> list[dict[str, tuple]]:
        return handles

    @staticmethod
    def _post_send_sync() -> None:
        torch.cuda.ipc_collect()
