"""Weight-transfer engines of vLLM (`vllm.distributed.weight_transfer`) for our model class, on the receiving side.

vLLM's own end in a reload that replaces and repacks parameters, which leaves our experts stale. These keep vLLM's
transports and copy into the live parameters instead. An update is: start, any number of buckets, the sender's digests,
finish. The digests are compared with those of the live parameters; without them an update cannot be finished.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from align.rollout.sync.stream import Bucket, digest


class LiveTransfer:
    """What the three engines share: no reload, and the proof at the end. Comes first among a class's bases."""

    def start_weight_update(self) -> None:
        self.model: Any
        self.verified = False
        self.model.begin_update(digest)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """A bucket, or `{"digests": {name: digest}}` as the last; `{"abandon": true}` ends a session left open."""
        if "abandon" in update_info:
            raise RuntimeError("this update of the weights was abandoned")
        if "digests" in update_info:
            self._verify(update_info["digests"])
        else:
            super().update_weights(update_info)  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        if not self.verified:
            raise RuntimeError("an update of the weights was finished without the sender's digests")

    def _verify(self, sent: dict[str, str]) -> None:
        held = self.model.finish_update()
        differing = [name for name in {**sent, **held} if sent.get(name) != held.get(name)]
        if differing:
            raise ValueError(
                f"{len(differing)} weights differ from those that were sent, the first is '{differing[0]}' (sent "
                f"{sent.get(differing[0])}, held {held.get(differing[0])})"
            )
        self.verified = True


@dataclass
class HostInit(WeightTransferInitInfo):
    """Host memory needs no rendezvous."""


@dataclass
class HostBucket(WeightTransferUpdateInfo):
    """One bucket: the tensors themselves (an engine in the sender's process), the path of a safetensors file in shared
    memory, or the file's bytes in base64."""

    tensors: Bucket | None = None
    path: str | None = None
    body: str | None = None


class HostTransfer(LiveTransfer, WeightTransferEngine[HostInit, HostBucket]):
    """Through the host's memory, or over HTTP."""

    init_info_cls = HostInit
    update_info_cls = HostBucket

    def __init__(self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module):
        super().__init__(config, vllm_config, device, model)

    def init_transfer_engine(self, init_info: HostInit) -> None:
        pass

    def receive_weights(self, update_info: HostBucket) -> None:
        if update_info.tensors is not None:
            bucket = update_info.tensors
        elif update_info.path is not None:
            bucket = list(load_file(Path(update_info.path)).items())
        elif update_info.body is not None:
            bucket = list(load(base64.b64decode(update_info.body)).items())
        else:
            raise ValueError("an update has neither tensors, nor a path, nor a body")
        self.model.load_weights(bucket)

    def shutdown(self) -> None:
        pass


class LiveNccl(LiveTransfer, NCCLWeightTransferEngine):
    """From another GPU, by NCCL broadcast."""


class LiveIpc(LiveTransfer, IPCWeightTransferEngine):
    """From another process on the same GPU, by CUDA IPC."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._packed_importer.close()
