"""The remote engine on two vLLM servers, compared with the in-process engine and the transformers model.

The first server is a program of its own; the others, and those that are restarted, are forked (see
`tests.integration.forked`).
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from align.config.rollout import Rollout
from align.errors import UserError
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.weights import published_weights
from align.rollout import started_server
from align.rollout.base import Completion, SamplingSettings
from align.rollout.remote import RemoteEngine
from align.rollout.sync.stream import combined_digest, digest

pytest.importorskip("vllm", reason="vLLM is not installed")
from align.rollout.vllm_engine import VllmEngine
from tests.families.checks import adopted
from tests.families.engine import difference, sample
from tests.integration import forked
from tests.tiny_families import tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = SamplingSettings(max_new_tokens=100, seed=3, n=3)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [1] * 30, list(range(100, 157))]
SIZES = {"max_model_length": 288, "cache_gib": 0.05, "max_sequences": 4, "bucket_mib": 1}


def made(intermediate_size: int = 48) -> HunYuanForCausalLM:
    torch.manual_seed(0)
    config = HunYuanConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    return HunYuanForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> HunYuanForCausalLM:
    return made()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local(checkpoint) -> list[list[Completion]]:
    """Completions of the in-process engine."""
    engine = VllmEngine(checkpoint, Rollout(**SIZES), dtype="float32", seed=0)
    rows = engine.generate(PROMPTS, SETTINGS)
    engine.close()
    return rows


@pytest.fixture(scope="module", autouse=True)
def forked_servers():
    numbers = itertools.count()

    def start(command, **given):
        return subprocess.Popen(command, **given) if next(numbers) == 0 else forked.popen(command, **given)

    with pytest.MonkeyPatch.context() as patched:
        forked.replace_popen(patched, started_server, start)
        yield


@pytest.fixture(scope="module")
def engine(checkpoint, local):
    rollout = Rollout(engine="remote", start_servers=2, start_timeout_seconds=600, **SIZES)
    engine = RemoteEngine(checkpoint, rollout, dtype="float32", seed=0)
    yield engine
    processes = [process for server in engine.servers for process in family(server.process.pid)]
    assert len(processes) >= 4
    engine.close()
    assert not psutil.wait_procs(processes, timeout=20)[1]


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@torch.no_grad()
def error(model: torch.nn.Module, rows: list[list[Completion]]) -> float:
    """Largest difference between the servers' log-probabilities and the model's."""
    worst = 0.0
    for completion in (c for row in rows for c in row):
        start = len(completion.prompt_ids)
        logits = model(torch.tensor([completion.prompt_ids + completion.token_ids])).logits[0, start - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    return worst


def assert_same(rows, expected) -> None:
    for row, wanted in zip(rows, expected, strict=True):
        assert [c.token_ids for c in row] == [c.token_ids for c in wanted]
        for completion, other in zip(row, wanted, strict=True):
            assert max(abs(a - b) for a, b in zip(completion.logprobs, other.logprobs)) < 1e-4
            assert (completion.prompt_ids, completion.finished) == (other.prompt_ids, other.finished)


def test_servers_generate_the_completions_of_the_in_process_engine(engine, local):
    assert_same(engine.generate(PROMPTS, SETTINGS), local)
    assert engine.last_generation.completion_tokens == 12 * 100


def test_stop_tokens_end_a_completion(engine, local):
    stop = local[0][0].token_ids[9]
    settings = SamplingSettings(max_new_tokens=100, seed=3, n=3, stop_token_ids=(stop,))
    for row, free in zip(engine.generate(PROMPTS, settings), local):
        for completion, other in zip(row, free):
            length = other.token_ids.index(stop) + 1 if stop in other.token_ids else 100
            assert completion.token_ids == other.token_ids[:length]
            assert completion.finished == (stop in other.token_ids)


@pytest.mark.parametrize("transfer", ["shared_memory", "http"])
def test_an_update_reaches_every_server(engine, model, transfer):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.rollout = engine.rollout.model_copy(update={"weight_transfer": transfer})
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.03)
        report = engine.update_weights(published_weights(model), 1)
        assert (report.engines, report.buckets) == (2, 2)
        assert report.checksum == combined_digest({name: digest(t) for name, t in published_weights(model)})
        rows = engine.generate(PROMPTS, SETTINGS)
        assert error(model, rows) < 1e-4
        assert {c.weight_version for row in rows for c in row} == {1}
    finally:
        model.load_state_dict(before, strict=False)  # named_parameters omits the tied head
        engine.update_weights(published_weights(model), 0)
    assert error(model, engine.generate(PROMPTS, SETTINGS)) < 1e-4


def test_killing_a_server_during_generation_changes_no_completion(engine, local, model):
    """Only the front end is killed. Its engine process is then an orphan and must end too."""
    front, *rest = family(engine.servers[0].process.pid)
    timer = threading.Timer(0.4, front.kill)
    timer.start()
    started = time.monotonic()
    rows = engine.generate(PROMPTS * 6, SETTINGS)
    timer.join()
    assert time.monotonic() - started < 300  # less than the 600 s that a request may take
    assert engine.last_generation.retried > 0
    assert_same(rows[:4], local)
    assert engine.update_weights(published_weights(model), 0).engines == 1  # the killed server is still restarting
    assert_same(engine.generate(PROMPTS, SETTINGS), local)
    assert not psutil.wait_procs(rest, timeout=20)[1]


def test_all_servers_are_restarted_with_the_weights(engine, local, model):
    engine.offer_weights(lambda: published_weights(model))
    for process in [process for server in engine.servers for process in family(server.process.pid)]:
        process.kill()
    assert_same(engine.generate(PROMPTS, SETTINGS), local)
    deadline = time.monotonic() + 600
    while not all(server.is_healthy() for server in engine.servers) and time.monotonic() < deadline:
        time.sleep(1)
    assert engine.update_weights(published_weights(model), 1).engines == 2
    assert error(model, engine.generate(PROMPTS, SETTINGS)) < 1e-4


# Its two workers wait for each other in busy loops, which takes minutes on cores that other tests use too.
@pytest.mark.timeout(1800)
def test_a_server_of_two_ranks_takes_an_update(tmp_path):
    """The digests cover only the received tensors; the log-probabilities show that each rank loaded its shard.

    Each rank has 32 columns of the experts, which vLLM's kernel supports.
    """
    model = made(intermediate_size=64)
    model.save_pretrained(tmp_path)
    rollout = Rollout(engine="remote", start_servers=1, tensor_parallel_size=2, start_timeout_seconds=1200, **SIZES)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    engine = RemoteEngine(tmp_path, rollout, dtype="float32", seed=0)
    try:
        assert engine.servers[0].facts["ranks"] == "2"
        assert error(model, engine.generate(PROMPTS, SETTINGS)) < 1e-4
        engine.update_weights(published_weights(moved), 1)
        rows = engine.generate(PROMPTS, SETTINGS)
        assert error(moved, rows) < 1e-4
        assert error(model, rows) > 1e-2
    finally:
        engine.close()


def test_a_server_of_vllms_own_class_takes_updates(tmp_path):
    """A tied head, experts that a kernel packs, and a router's bias that vLLM ignores without our corrections."""
    models = [tiny_model("ernie4_5_moe", seed, tie_word_embeddings=True) for seed in (0, 10)]
    models[0].save_pretrained(tmp_path)
    settings = {"max_model_length": 128, "cache_gib": 0.1, "max_sequences": 8, "bucket_mib": 1}
    rollout = Rollout(engine="remote", start_servers=1, **settings)
    engine = RemoteEngine(tmp_path, rollout, dtype="float32", seed=0)
    try:
        assert difference(models[0], sample(engine)) < 1e-4
        weights = dict(published_weights(adopted("ernie4_5_moe", models[1], tie_word_embeddings=True)))
        engine.update_weights(iter(weights.items()), 1)
        assert difference(models[1], sample(engine)) < 1e-4
        del weights["model.layers.1.self_attn.o_proj.weight"]
        with pytest.raises(UserError, match=r"self_attn\.o_proj \(weight\): 0 of"):
            engine.update_weights(iter(weights.items()), 2)
        with pytest.raises(UserError):
            sample(engine)
    finally:
        engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("transfer", ["ipc", "nccl"])
def test_an_update_by_vllms_gpu_transports(model, tmp_path, transfer):
    """With ipc, trainer and server share a GPU; with nccl, each has its own."""
    needed = 1 if transfer == "ipc" else 2
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} GPU(s), {torch.cuda.device_count()} found")
    model.save_pretrained(tmp_path)
    rollout = Rollout(engine="remote", start_servers=1, weight_transfer=transfer, **SIZES)
    engine = RemoteEngine(tmp_path, rollout, dtype="float32", seed=0)
    try:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.03)
        assert engine.update_weights(published_weights(moved.cuda()), 1).buckets == 2
        rows = engine.generate(PROMPTS, SETTINGS)
        assert error(moved.cpu(), rows) < 1e-2
        assert error(model, rows) > 5e-2
    finally:
        engine.close()


def test_a_server_ends_with_the_trainer_that_started_it(tmp_path):
    """Only the thread that watches the parent is tested. The process has a child, as a server has an engine process."""
    server = tmp_path / "server.py"
    server.write_text(
        "import os, subprocess, sys, threading, time\n"
        "from align.rollout.serve import _end_with_parent\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    trainer = tmp_path / "trainer.py"
    trainer.write_text(
        "import subprocess, sys, time\n"
        f"command = [sys.executable, {str(server)!r}]\n"
        "server = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)\n"
        "print(server.pid, server.stdout.readline().decode().strip(), flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(trainer)], stdout=subprocess.PIPE, env=os.environ) as started:
        pids = [int(word) for word in started.stdout.readline().split()]
        assert len(pids) == 2
        started.kill()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
