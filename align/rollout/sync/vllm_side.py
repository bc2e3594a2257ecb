"""Receiving side of a weight update: transfer engines (`vllm.distributed.weight_transfer`) that verify the weights.

The engines use vLLM's transports. A model class with `begin_update` takes the weights in place; for vLLM's own classes
`LayerwiseReload` has the same interface.

An update is: start, any number of buckets, the sender's digests, finish. The digests are compared with those that
`finish_update` returns; an update without digests cannot be finished.
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

from align.rollout.sync.reload import LayerwiseReload
from align.rollout.sync.stream import Bucket, digest


class VerifiedTransfer:
    """Common part of the three engines: they verify the weights at the end. Must be the first base class.

    model: receiver of the weights. vLLM sets it to its model again when the update ends, also after an error.
    """

    model: Any
    model_config: Any
    verified = False
    _reload: LayerwiseReload | None = None

    def start_weight_update(self) -> None:
        self.verified = False
        if not hasattr(self.model, "begin_update"):
            self._reload = self._reload or LayerwiseReload(self.model, self.model_config)
            self.model = self._reload
        self.model.begin_update(digest)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a bucket, or verify `{"digests": {name: digest}}`. `{"abandon": true}` raises, which ends the update."""
        if "abandon" in update_info:
            raise RuntimeError("this weight update was abandoned")
        if "digests" in update_info:
            self._verify(update_info["digests"])
        else:
            super().update_weights(update_info)  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        if not self.verified:
            raise RuntimeError("a weight update was finished without the sender's digests")

    def _verify(self, sent: dict[str, str]) -> None:
        loaded = self.model.finish_update()
        differing = [name for name in {**sent, **loaded} if sent.get(name) != loaded.get(name)]
        if differing:
            raise ValueError(
                f"{len(differing)} weights differ from those that were sent; the first is '{differing[0]}' (sent "
                f"{sent.get(differing[0])}, loaded {loaded.get(differing[0])})"
            )
        self.verified = True


@dataclass
class HostInit(WeightTransferInitInfo):
    """Empty: host memory needs no rendezvous."""


@dataclass
class HostBucket(WeightTransferUpdateInfo):
    """One bucket; exactly one of the fields is set.

    tensors: the tensors themselves, for an engine in the sender's process.
    path: a safetensors file in shared memory.
    body: the bytes of a safetensors file in base64.
    """

    tensors: Bucket | None = None
    path: str | None = None
    body: str | None = None


class HostTransfer(VerifiedTransfer, WeightTransferEngine[HostInit, HostBucket]):
    """Transfer through host memory or over HTTP."""

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
            raise ValueError("a bucket has neither tensors, nor a path, nor a body")
        self.model.load_weights(bucket)

    def shutdown(self) -> None:
        pass


class NcclTransfer(VerifiedTransfer, NCCLWeightTransferEngine):
    """Transfer from another GPU, by NCCL broadcast."""


class IpcTransfer(VerifiedTransfer, IPCWeightTransferEngine):
    """Transfer from another process on the same GPU, by CUDA IPC."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._packed_importer.close()
