"""Delivery of weight buckets by vLLM's own GPU transports: NCCL to other GPUs, CUDA IPC within one GPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from align.launch.processes import free_port
from align.launch.route import route_to
from align.rollout.server import Server
from align.rollout.sync.stream import Bucket
from align.rollout.sync.transport import Deliver
from align.rollout.vllm_versions import weight_source


class GpuTransfer:
    """Drives vLLM's transport bucket by bucket. kind: nccl or ipc.

    vLLM's trainer side sends a start and a finish request with every transfer. Here an update has one transfer per
    bucket, so `_BucketClient` omits these requests, and `ToServers` sends them once per update.
    """

    def __init__(self, kind: str, servers: list[Server], bucket_bytes: int, timeout: float):
        client, source = _BucketClient(servers, timeout), weight_source([])
        self._trainer_side: Any
        if kind == "nccl":
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            ranks = sum(int(server.facts["ranks"]) for server in servers)
            nccl = NCCLTrainerInitInfo(
                rank=0,
                master_address=own_address(servers),
                master_port=free_port(),
                world_size=1 + ranks,
                packed_buffer_size_bytes=bucket_bytes,
            )
            self._trainer_side = WeightTransferTrainerFactory.trainer_init(nccl, client=client, source=source)
        else:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            from align.rollout.sync.ipc import RankZeroIpc

            ipc = IPCTrainerInitInfo(rank=0, packed=True)
            self._trainer_side = RankZeroIpc.trainer_init(ipc, client=client, source=source)

    def prepare(self, bucket: Bucket) -> Deliver:
        copied = [(name, tensor.cuda().clone() if tensor.is_cuda else tensor.cuda()) for name, tensor in bucket]

        def deliver(servers: list[Server], timeout: float) -> None:
            self._deliver(copied, servers, timeout)

        return deliver

    def close(self) -> None:
        self._trainer_side.shutdown()

    def _deliver(self, bucket: Bucket, servers: list[Server], timeout: float) -> None:
        """Send the bucket; mark all servers as failed if that fails, because the others hang in the same broadcast."""
        self._trainer_side.source = weight_source(bucket)
        sending = ThreadPoolExecutor(max_workers=1)
        try:
            sending.submit(self._trainer_side.send_weights).result(timeout)
        except Exception as error:
            for server in servers:
                server.failure = f"the transfer of weights failed ({error or type(error).__name__})"
        finally:
            sending.shutdown(wait=False)


def own_address(servers: list[Server]) -> str:
    """Address of this machine that the servers can reach."""
    remote = next((server for server in servers if not server.is_local), servers[0])
    return route_to(remote.host, remote.port).here


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
