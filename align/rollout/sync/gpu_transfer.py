"""Delivery of weight buckets by vLLM's own GPU transports: NCCL to other GPUs, CUDA IPC within one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from align.launch.processes import free_port
from align.rollout.server import Server
from align.rollout.sync.stream import Bucket
from align.rollout.sync.transport import Deliver


class GpuTransfer:
    """Drives vLLM's transport bucket by bucket. kind: nccl or ipc.

    vLLM's trainer side sends a start and a finish around every transfer. Here these belong to the whole update, so the
    client that it is given omits them.
    """

    def __init__(self, kind: str, servers: list[Server], bucket_bytes: int, timeout: float):
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        self.source = bucket_source()
        info: Any
        if kind == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            ranks = sum(int(server.facts["ranks"]) for server in servers)
            local = all(server.is_local for server in servers)
            info = NCCLTrainerInitInfo(
                rank=0,
                master_address="127.0.0.1" if local else socket.gethostbyname(socket.gethostname()),
                master_port=free_port(),
                world_size=1 + ranks,
                packed_buffer_size_bytes=bucket_bytes,
            )
        else:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=bucket_bytes)
        client = _BucketClient(servers, timeout)
        self._trainer_side: Any = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.source)

    def prepare(self, bucket: Bucket) -> Deliver:
        copied = [(name, tensor.cuda().clone() if tensor.is_cuda else tensor.cuda()) for name, tensor in bucket]

        def deliver(servers: list[Server], timeout: float) -> None:
            self._deliver(copied, servers, timeout)

        return deliver

    def close(self) -> None:
        self._trainer_side.shutdown()

    def _deliver(self, bucket: Bucket, servers: list[Server], timeout: float) -> None:
        """Send the bucket. A server that dies in a broadcast leaves the others inside it, so a failure marks all."""
        self.source.bucket = bucket
        sending = ThreadPoolExecutor(max_workers=1)
        try:
            sending.submit(self._trainer_side.send_weights).result(timeout)
        except Exception as error:
            for server in servers:
                server.failure = f"the transfer of weights failed ({error or type(error).__name__})"
        finally:
            sending.shutdown(wait=False)


def bucket_source() -> Any:
    """vLLM `WeightSource` over one bucket at a time, its attribute `bucket`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class BucketSource(WeightSource):
        bucket: Bucket = []

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.bucket]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self.bucket)

    return BucketSource()


class _BucketClient:
    """vLLM's `VLLMWeightSyncClient` for several servers, without the start and finish of each transfer."""

    def __init__(self, servers: list[Server], timeout: float):
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        self.servers = servers
        self.clients = {server.url: HTTPVLLMWeightSyncClient(server.url, timeout) for server in servers}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos, rank = {}, init_info.get("rank_offset", 1)
        for server in self.servers:
            infos[server.url] = init_info | ({"rank_offset": rank} if "rank_offset" in init_info else {})
            rank += int(server.facts["ranks"])
        self._on_all(lambda server: self.clients[server.url].init_weight_transfer_engine(infos[server.url]))

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        self._on_all(lambda server: self.clients[server.url].update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass

    def _on_all(self, action: Callable[[Server], object]) -> None:
        with ThreadPoolExecutor(max_workers=len(self.servers)) as pool:
            list(pool.map(action, self.servers))
