"""vLLM's options, sleep, attention heads and weight transfers as on a GPU, with torch.cuda patched.

Nothing here runs on a GPU. Checks and decisions of vLLM are made by its own Python code, not by a copy of it.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
from align.config.rollout import Rollout
from align.rl import sample
from align.rollout import vllm_options
from align.rollout.base import SamplingSettings
from align.rollout.server import Server
from align.rollout.sync import gpu_transfer
from align.rollout.sync.gpu_transfer import GpuTransfer
from align.rollout.vllm_engine import VllmEngine
from align.rollout.vllm_options import engine_options, generation_stance
from align.rollout.vllm_versions import serve_parser, weight_source
from align.train.device import return_cached_memory

GIB = 2**30
BUCKET = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(4, dtype=torch.bfloat16))]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A simulated GPU of 141 GiB; the trainer has reserved `held` bytes of it."""
    state = SimpleNamespace(total=141 * GIB, held=100 * GIB)
    monkeypatch.setattr(vllm_options, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (state.total - state.held, state.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: state.held)
    return state


# --- memory ------------------------------------------------------------------------------------------------


def requested(options: dict[str, Any], gpu: SimpleNamespace) -> float:
    """GiB of free memory that vLLM's own check requires. Raises ValueError if less is free."""
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    snapshot: Any = SimpleNamespace(total_memory=gpu.total, free_memory=gpu.total - gpu.held, device_="cuda:0")
    share = options.get("gpu_memory_utilization", CacheConfig.gpu_memory_utilization)
    config: Any = SimpleNamespace(gpu_memory_utilization=share)
    return request_memory(snapshot, config) / GIB


@pytest.mark.parametrize("in_process", [True, False])
def test_an_engine_with_a_cache_of_given_size_starts_beside_a_trainer(tmp_path: Path, gpu, in_process: bool) -> None:
    with pytest.raises(ValueError, match="less than desired GPU memory utilization"):
        requested({}, gpu)
    options = engine_options(tmp_path, Rollout(cache_gib=8.0), dtype="bfloat16", seed=0, in_process=in_process)
    assert options["kv_cache_memory_bytes"] == 8 * GIB
    assert requested(options, gpu) < 2


def test_the_default_cache_of_an_engine_in_the_trainers_process(tmp_path: Path, gpu) -> None:
    options = engine_options(tmp_path, Rollout(), dtype="bfloat16", seed=0, in_process=True)
    assert "kv_cache_memory_bytes" not in options
    assert requested(options, gpu) == pytest.approx(20.5)  # half of 41 GiB
    gpu.held = 0
    options = engine_options(tmp_path, Rollout(), dtype="bfloat16", seed=0, in_process=True)
    assert requested(options, gpu) == pytest.approx(126.9)


def test_the_default_cache_of_a_server_is_vllms(tmp_path: Path, gpu) -> None:
    options = engine_options(tmp_path, Rollout(), dtype="bfloat16", seed=0)
    assert options.keys().isdisjoint({"gpu_memory_utilization", "kv_cache_memory_bytes"})


def test_the_default_cache_on_a_cpu(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(vllm_options, "has_gpu", lambda: False)
    options = engine_options(tmp_path, Rollout(), dtype="float32", seed=0, in_process=True)
    assert options["kv_cache_memory_bytes"] == GIB // 2
    assert "gpu_memory_utilization" not in options


def engine_with(llm: Any, *, has_gpu: bool = True) -> VllmEngine:
    engine = VllmEngine.__new__(VllmEngine)
    engine.rollout, engine._llm, engine._has_gpu, engine._recorder, engine._complete = (
        Rollout(sleep=True),
        llm,
        has_gpu,
        None,
        True,
    )
    return engine


def test_a_sleeping_engine_drops_weights_that_are_replaced_anyway() -> None:
    """Sleep level 1 would copy weights to host memory and back. Without an update the engine refuses to generate."""
    levels: list[int] = []
    model = SimpleNamespace(enable_sleep_mode=True)
    core = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
    engine = engine_with(SimpleNamespace(llm_engine=core, sleep=lambda level: levels.append(level), wake_up=list))
    engine.sleep()
    engine.wake()
    assert levels == [2]
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate([[1]], SamplingSettings(2))


@pytest.mark.parametrize("sleeps", [True, False])
def test_cached_memory_is_returned_before_the_engine_allocates(monkeypatch, gpu, sleeps: bool) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty the cache"))
    engine: Any = SimpleNamespace(sleep=lambda: events.append("sleep"), wake=lambda: events.append("wake"))
    stage: Any = SimpleNamespace(rollout=Rollout(sleep=sleeps))

    def build() -> Any:
        events.append("start")
        return engine

    sampler = sample.RolloutSampler(build, [], stage, stop_ids=[], seed=0)
    sampler.sleep()
    sampler.wake()
    started = ["empty the cache", "start"]
    assert events == ([*started, "sleep", "empty the cache", "wake"] if sleeps else started)


def test_models_of_finished_stages_are_freed_before_the_cache_is(monkeypatch, gpu) -> None:
    class Model:
        pass

    model: Any = Model()
    model.itself = model
    alive = weakref.ref(model)
    del model
    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(alive()))
    return_cached_memory()
    assert seen == [None]


# --- compilation and attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("has_gpu", [True, False])
def test_kernels_are_compiled_on_a_gpu_only(has_gpu: bool) -> None:
    """Without compilation, vLLM's FlexAttention stores scores for all pairs of tokens."""
    compiled: list[object] = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    @torch.compile(backend=backend)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def generate(*_: object, **__: object) -> list[object]:
        double(torch.ones(3))
        return []

    engine_with(SimpleNamespace(generate=generate), has_gpu=has_gpu).generate([], SamplingSettings(1))
    assert bool(compiled) == has_gpu
    assert isinstance(generation_stance(has_gpu=True), contextlib.nullcontext)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "padded"),
    [(16, torch.float32, 32), (128, torch.float32, 128), (16, torch.bfloat16, 16)],
)
def test_heads_in_float32_are_padded_to_the_smallest_of_vllms_triton_kernel(
    monkeypatch, head_dim: int, dtype: torch.dtype, padded: int
) -> None:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    from align.models.hunyuan import vllm as model

    monkeypatch.setattr(model, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert model._kernel_head_dim(head_dim, dtype) == padded
    if dtype == torch.float32:
        assert TritonAttentionBackend.supports_head_size(padded)
        assert dtype in TritonAttentionBackend.supported_dtypes


# --- versions ----------------------------------------------------------------------------------------------


class Source32(ABC):
    """Stand-in for `WeightSource` of vLLM 0.32, with the methods that our class must define."""

    @abstractmethod
    def metadata(self): ...

    @abstractmethod
    def __iter__(self): ...


class Source33(ABC):
    """Stand-in for `WeightSource` of vLLM 0.33, with its check of subclasses."""

    def __init_subclass__(cls, **values: Any) -> None:
        super().__init_subclass__(**values)
        if not isinstance(cls.__dict__["metadata"], cached_property):
            raise TypeError(f"{cls.__name__}.metadata must be a functools.cached_property")

    @property
    @abstractmethod
    def metadata(self): ...

    def iter_full(self):
        raise NotImplementedError


def with_base(monkeypatch: pytest.MonkeyPatch, source: type) -> None:
    module: Any = ModuleType("vllm.distributed.weight_transfer.base")
    module.WeightSource, module.ParamMeta = source, lambda *values: values
    monkeypatch.setitem(sys.modules, module.__name__, module)


DECLARED = [("a", torch.float32, (2, 3)), ("b", torch.bfloat16, (4,))]


def test_a_source_of_weights_for_0_32(monkeypatch) -> None:
    with_base(monkeypatch, Source32)
    source = weight_source(BUCKET)
    assert source.metadata() == DECLARED
    assert [list(source), list(source)] == [BUCKET, BUCKET]  # each iteration starts from the beginning


def test_a_source_of_weights_for_0_33(monkeypatch) -> None:
    with_base(monkeypatch, Source33)
    source = weight_source(BUCKET)
    assert source.metadata == DECLARED
    assert source.metadata is source.metadata
    assert [list(source.iter_full()), list(source.iter_full())] == [BUCKET, BUCKET]
    assert weight_source(BUCKET[:1]).metadata == DECLARED[:1]  # the next bucket has a new source


def test_the_installed_vllm_accepts_our_source() -> None:
    from vllm.distributed.weight_transfer.base import WeightSource

    assert isinstance(weight_source(BUCKET), WeightSource)


def test_the_parser_of_0_33_has_moved(monkeypatch) -> None:
    moved: Any = ModuleType("vllm.entrypoints.common.cli_args")
    moved.make_arg_parser, moved.validate_parsed_serve_args = object(), object()
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.common", ModuleType("vllm.entrypoints.common"))
    monkeypatch.setitem(sys.modules, moved.__name__, moved)
    assert serve_parser() == (moved.make_arg_parser, moved.validate_parsed_serve_args)


# --- weight transfers --------------------------------------------------------------------------------------


class Recorder:
    """Stand-in for vLLM's client of a server, which records the requests of vLLM's sender by server URL."""

    requests: dict[str, list[Any]]

    def __init__(self, url: str, timeout: float):
        self.url = url
        self.requests[url] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.requests[self.url].append(init_info)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.requests[self.url].append(update_info)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    from vllm.distributed.weight_transfer import clients

    monkeypatch.setattr(Recorder, "requests", {}, raising=False)
    monkeypatch.setattr(clients, "HTTPVLLMWeightSyncClient", Recorder)
    return Recorder.requests


def servers_at(ranks: str, *urls: str) -> list[Server]:
    servers = [Server(url) for url in urls]
    for server in servers:
        server.facts, server.failure = {"ranks": ranks}, None
    return servers


def test_ipc_sends_from_rank_0_alone(monkeypatch, requests) -> None:
    """The other ranks are busy gathering weights, so a collective in vLLM's sender would wait for them forever.

    One tensor is larger than `bucket_bytes`. vLLM refuses a tensor that is larger than its buffer.
    """
    from vllm.distributed.weight_transfer import packed_tensor

    def collective(*_: object, **__: object) -> None:
        raise AssertionError("a collective over the default group")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
    for name in ("all_gather_object", "barrier"):
        monkeypatch.setattr(torch.distributed, name, collective)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="gpu-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **values: empty(*size, **values))
    monkeypatch.setattr(packed_tensor, "reduce_tensor", lambda buffer: (None, ("handle", buffer.numel())))
    (server,) = servers_at("1", "http://127.0.0.1:1")
    transfer = GpuTransfer("ipc", [server], bucket_bytes=8, timeout=1)
    transfer._deliver(BUCKET, [server], 5)
    assert server.failure is None
    handshake, update = requests[server.url]
    assert handshake == {"packed": True}
    assert update["names"] == ["a", "b"]
    assert update["tensor_sizes"] == [24, 8]
    assert update["ipc_handles"] == {"gpu-0": ("handle", 32)}


def test_nccl_meets_the_servers_and_sends_each_bucket(monkeypatch, requests) -> None:
    """vLLM compares the tensors of a source with its metadata, so stale metadata would be an error here."""
    from vllm.distributed.weight_transfer import nccl_engine

    begun: list[Any] = []
    sent: list[list[tuple[str, torch.Tensor]]] = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: begun.append(info) or "communicator")
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **_: sent.append([*iterator]))
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(gpu_transfer, "route_to", lambda host, port: SimpleNamespace(here=f"route to {host}"))
    servers = servers_at("2", "http://127.0.0.1:1", "http://gpu7:1")
    transfer = GpuTransfer("nccl", servers, bucket_bytes=8, timeout=1)
    assert (begun[0].master_address, begun[0].world_size, begun[0].rank) == ("route to gpu7", 5, 0)
    for bucket in (BUCKET, BUCKET[:1]):
        transfer._deliver(bucket, servers, 5)
    assert sent == [BUCKET, BUCKET[:1]]
    assert [server.failure for server in servers] == [None, None]
    for server, offset in zip(servers, (1, 3), strict=True):
        handshake, first, second = requests[server.url]
        assert (handshake["rank_offset"], handshake["world_size"]) == (offset, 5)
        assert (first["names"], second["names"]) == (["a", "b"], ["a"])
        assert first["shapes"] == [[2, 3], [4]]
