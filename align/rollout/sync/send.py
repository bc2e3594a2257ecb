"""One weight update: send the published weights in buckets, digest each tensor, verify the digests at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from align.rollout.base import SyncReport
from align.rollout.sync.stream import Bucket, buckets, combined_digest, digest


class Transport(Protocol):
    """Carries a weight update to one or several engines."""

    @property
    def engines(self) -> int:
        """Number of engines in the update; engines that failed no longer count."""
        ...

    def start(self) -> None:
        """Begin an update; abandon an earlier update that is unfinished."""
        ...

    def send(self, bucket: Bucket) -> None:
        """Send a bucket; the caller may change its tensors afterwards."""
        ...

    def finish(self, digests: dict[str, str], version: int) -> None:
        """Let the engines compare their weights with the digests, then adopt the version."""
        ...


def send_stream(
    stream: Iterable[tuple[str, Tensor]], transport: Transport, version: int, *, bucket_mib: int, dtype: torch.dtype
) -> SyncReport:
    """Send a stream of weights as version `version`. The stream is read once, one bucket at a time."""
    started = time.perf_counter()
    digests: dict[str, str] = {}
    size = count = 0
    transport.start()
    for bucket in buckets(stream, bucket_mib * 2**20, dtype):
        digests |= {name: digest(tensor) for name, tensor in bucket}
        transport.send(bucket)
        size += sum(tensor.nbytes for _, tensor in bucket)
        count += 1
    transport.finish(digests, version)
    return SyncReport(
        bytes=size,
        seconds=time.perf_counter() - started,
        version=version,
        buckets=count,
        checksum=combined_digest(digests),
        engines=transport.engines,
    )


class InProcess:
    """`Transport` to a `vllm.LLM` in this process. Tensors are passed by reference."""

    engines = 1

    def __init__(self, llm: Any):
        self.llm = llm

    def start(self) -> None:
        try:
            self.llm.start_weight_update()
        except RuntimeError:  # an earlier update is open because its stream raised
            end_open_update(self.llm)
            self.llm.start_weight_update()

    def send(self, bucket: Bucket) -> None:
        self.llm.update_weights({"update_info": {"tensors": bucket}})

    def finish(self, digests: dict[str, str], version: int) -> None:
        self.llm.update_weights({"update_info": {"digests": digests}})
        self.llm.finish_weight_update(str(version))


def end_open_update(llm: Any) -> None:
    """End an open update: vLLM ends an update when its transfer engine raises, and ours raise on `abandon`."""
    try:
        llm.update_weights({"update_info": {"abandon": True}})
    except RuntimeError:
        return


def checkpoint_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Iterate over a checkpoint in the published layout, tensor by tensor from its safetensors files.

    A tied head is omitted, as in `published_weights`.
    """
    tied = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings")
    if tied is None:
        tied = AutoConfig.from_pretrained(folder).tie_word_embeddings
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                if not (tied and key == "lm_head.weight"):
                    yield key, file.get_tensor(key)
