"""The remote engine with fake servers that fail in many ways; each test takes seconds.

test_remote_vllm.py tests the engine with real vLLM servers.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from align.config.rollout import Rollout
from align.errors import UserError
from align.rollout import remote
from align.rollout.base import SamplingSettings
from align.rollout.remote import RemoteEngine
from align.rollout.sync.send import checkpoint_weights
from align.rollout.sync.stream import digest
from align.rollout.sync.transport import HttpBody

PROMPTS = [[i, i + 1] for i in range(6)]
SETTINGS = SamplingSettings(max_new_tokens=4, seed=3, n=2)


class FakeServer:
    """vLLM's HTTP routes, with a dictionary of weights. A completion depends on its seed and the sum of the weights."""

    def __init__(self, **facts: str):
        self.facts = {"dtype": "float32", "transfer": "host", "routing": "False", **facts}
        self.weights: dict[str, torch.Tensor] = {}
        self.version = "default"
        self.updating: dict[str, torch.Tensor] | None = None
        self.calls: Counter[str] = Counter()
        self.queries: dict[str, str] = {}
        self.generate_status = 200
        self.dies_after: int | None = None
        self.hangs = False
        self.length = 512
        self.response: dict = {}
        self.seen: list[int] = []
        self._start(0)

    def _start(self, port: int) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                fake.handle(self, None)

            def do_POST(self):
                fake.handle(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def come_back(self) -> None:
        """Restart at the same address without the weights that were sent."""
        self.weights, self.version, self.updating, self.dies_after = {}, "default", None, None
        self._start(self.port)

    def handle(self, request: BaseHTTPRequestHandler, body: bytes | None) -> None:
        path = request.path.partition("?")[0]
        self.calls[path] += 1
        self.queries[path] = request.path.partition("?")[2]
        status, response = 200, self.respond(path, json.loads(body) if body else {})
        if isinstance(response, tuple):
            status, response = response
        if response is None:  # like a killed process: the connection ends without a response
            request.connection.close()
            return
        text = json.dumps(response).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def respond(self, path: str, body: dict):
        if path == "/v1/models":
            names = ["align", *(f"{key}={value}" for key, value in self.facts.items())]
            return {"data": [{"id": name, "max_model_len": self.length} for name in names]}
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/start_weight_update":
            if self.updating is not None:
                return 500, {"error": {"message": "already active"}}
            self.updating = {}
        if path == "/update_weights":
            return self.update(body["update_info"])
        if path == "/finish_weight_update":
            self.weights, self.updating = self.updating or {}, None
            self.version = body["weight_version"]
        return {"success": True, "world_size": 1}

    def update(self, info: dict):
        assert self.updating is not None
        if "abandon" in info:
            self.updating = None
            return 500, {"error": {"message": "abandoned"}}
        if "path" in info:
            self.updating |= {name: tensor.clone() for name, tensor in load_file(info["path"]).items()}
        elif "body" in info:
            self.updating |= load(base64.b64decode(info["body"]))
        elif {name: digest(tensor) for name, tensor in self.updating.items()} != info["digests"]:
            self.updating = None
            return 500, {"error": {"message": "1 weights differ from those that were sent"}}
        return {}

    def generate(self, body: dict):
        if self.hangs:
            time.sleep(3)
        time.sleep(0.005)
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                if self.dies_after == -1:
                    threading.Thread(target=self.stop).start()
                return None
        if self.generate_status != 200:
            return self.generate_status, {"error": {"message": "broken on purpose"}}
        sampling = body["sampling_params"]
        self.seen.append(sampling["seed"])
        generator = torch.Generator().manual_seed(sampling["seed"] + int(sum(w.sum() for w in self.weights.values())))
        tokens = torch.randint(0, 1000, (sampling["max_tokens"],), generator=generator).tolist()
        choice = {
            "token_ids": tokens,
            "finish_reason": "length",
            "routed_experts": None,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
            "logprobs": {"content": [{"token_id": t, "logprob": -t / 1000} for t in tokens]},
        }
        return {"choices": [choice | self.response]}


WEIGHTS = {f"w{i}": torch.arange(4.0 * 200_000).view(4, -1) % 7 + i for i in range(5)}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "hunyuan", "max_position_embeddings": 512}))
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder


@pytest.fixture
def servers():
    fakes = [FakeServer(), FakeServer()]
    yield fakes
    for server in fakes:
        server.stop()


@pytest.fixture
def connect(checkpoint, servers):
    engines = []

    def connected(**changes) -> RemoteEngine:
        values = {
            "engine": "remote",
            "servers": [server.url for server in servers],
            "max_sequences": 2,
            "bucket_mib": 5,
            "start_timeout_seconds": 0.5,
            "request_timeout_seconds": 20,
        }
        engines.append(RemoteEngine(checkpoint, Rollout(**(values | changes)), dtype="float32", seed=0))
        return engines[-1]

    yield connected
    for engine in engines:
        engine.close()


def tokens(rows) -> list[list[int]]:
    return [completion.token_ids for row in rows for completion in row]


@pytest.mark.parametrize("transfer", ["auto", "http"])
def test_every_server_gets_the_weights_in_buckets(connect, servers, transfer):
    engine = connect(weight_transfer=transfer)
    for server in servers:
        assert all(torch.equal(server.weights[name], tensor) for name, tensor in WEIGHTS.items())
        assert (
            server.calls["/update_weights"] == 5 + 1
        )  # one 3.05 MiB tensor per bucket of at most 5 MiB; then the digests
    report = engine.update_weights(((n, t.double() + 1) for n, t in WEIGHTS.items()), 1)
    assert (report.version, report.buckets, report.engines) == (1, 5, 2)
    assert report.bytes == sum(t.numel() * 4 for t in WEIGHTS.values())
    for server in servers:
        assert server.weights["w2"].dtype == torch.float32
        assert torch.equal(server.weights["w2"], WEIGHTS["w2"] + 1)
        assert server.calls["/pause"] == server.calls["/reset_prefix_cache"] == server.calls["/resume"] == 2
    assert {c.weight_version for row in engine.generate(PROMPTS, SETTINGS) for c in row} == {1}


def test_requests_are_distributed_and_the_result_is_in_order(connect, servers):
    rows = connect().generate(PROMPTS, SETTINGS)
    assert [c.prompt_ids for row in rows for c in row] == [p for p in PROMPTS for _ in range(2)]
    assert all(server.calls["/inference/v1/generate"] >= 3 for server in servers)
    assert len({tuple(t) for t in tokens(rows)}) == 12


def test_servers_started_with_sleep_sleep_between_rollouts(connect, servers):
    servers[0].facts["sleeps"] = "True"
    engine = connect(sleep=True)
    calls = [server.calls for server in servers]
    before = calls[0]["/wake_up"]
    engine.sleep()
    assert calls[0]["/sleep"] == 1
    assert servers[0].queries["/sleep"] == "level=2"  # drops the weights, which the next update replaces
    engine.wake()
    assert calls[0]["/wake_up"] == before + 1
    with pytest.raises(RuntimeError, match="dropped their weights"):
        engine.generate(PROMPTS, SETTINGS)
    engine.update_weights(iter(WEIGHTS.items()), version=1)
    engine.generate(PROMPTS, SETTINGS)
    assert not calls[1]["/sleep"] + calls[1]["/wake_up"]
    connect().sleep()  # the recipe does not set rollout.sleep
    assert calls[0]["/sleep"] == 1


@pytest.mark.parametrize("kind", ["nccl", "http"])
def test_a_server_that_was_restarted_gets_a_new_communicator(connect, servers, monkeypatch, kind):
    """The restarted server has the same address, but does not belong to the trainer's NCCL communicator."""
    made = []

    class Communicator(HttpBody):
        def __init__(self, *_):
            made.append(self)

    monkeypatch.setattr(remote, "GpuTransfer", Communicator)
    monkeypatch.setattr(remote, "HttpBody", Communicator)
    monkeypatch.setattr(remote, "transfer_kind", lambda wanted, servers: kind)
    engine = connect()
    engine.update_weights(iter(WEIGHTS.items()), version=1)
    assert len(made) == 1
    servers[0].stop()
    servers[0].come_back()
    engine.servers[0].failure = "it died"
    engine.update_weights(iter(WEIGHTS.items()), version=2)
    assert len(made) == (2 if kind == "nccl" else 1)


def test_a_server_that_comes_back_asleep_is_woken_before_it_gets_weights(connect, servers):
    for server in servers:
        server.facts["sleeps"] = "True"
    engine = connect(sleep=True)
    engine.sleep()
    servers[0].stop()
    engine.wake()
    assert [server.failure is None for server in engine.servers] == [False, True]
    servers[0].come_back()
    woken = servers[0].calls["/wake_up"]
    engine.update_weights(iter(WEIGHTS.items()), version=1)
    assert servers[0].calls["/wake_up"] == woken + 1
    assert servers[0].weights.keys() == WEIGHTS.keys()


def test_the_result_is_the_same_if_a_server_dies(connect, servers):
    engine = connect()
    expected = tokens(engine.generate(PROMPTS, SETTINGS))
    assert engine.last_generation.retried == 0
    servers[0].dies_after = 1
    assert tokens(engine.generate(PROMPTS, SETTINGS)) == expected
    assert 1 <= engine.last_generation.retried <= 2
    assert tokens(engine.generate(PROMPTS, SETTINGS)) == expected
    assert engine.last_generation.retried == 0


@pytest.mark.parametrize("fault", ["internal error", "other weights", "no tokens", "aborted"])
def test_a_server_with_a_wrong_response_is_not_used_again(connect, servers, fault):
    engine = connect()
    expected = tokens(engine.generate(PROMPTS, SETTINGS))
    if fault == "internal error":
        servers[0].generate_status = 500
    elif fault == "other weights":
        servers[0].version = "0badc0de:7"
    else:
        servers[0].response = {"token_ids": [], "finish_reason": "abort" if fault == "aborted" else "stop"}
    assert tokens(engine.generate(PROMPTS, SETTINGS)) == expected
    assert engine.last_generation.retried > 0


def test_a_server_that_hangs_is_not_used_again(connect, servers):
    engine = connect(request_timeout_seconds=1)
    expected = tokens(engine.generate(PROMPTS, SETTINGS))
    servers[0].hangs = True
    assert tokens(engine.generate(PROMPTS, SETTINGS)) == expected
    assert "no response within 1 s" in engine.servers[0].failure


def test_an_error_names_all_servers_if_none_is_left(connect, servers):
    engine = connect()
    servers[0].dies_after = servers[1].dies_after = 0
    with pytest.raises(
        UserError,
        match=rf"no rollout server responds: all 2 rollout servers failed, .*{servers[0].port}.*{servers[1].port}",
    ):
        engine.generate(PROMPTS, SETTINGS)
    with pytest.raises(UserError, match="no rollout server responds"):
        engine.update_weights(iter(WEIGHTS.items()), 1)


def test_a_completion_that_fails_everywhere_is_an_error(connect, servers):
    engine = connect()
    for server in servers:
        server.generate_status = 500
    with pytest.raises(UserError, match=r"one completion failed on 3 servers, the last time with: broken on purpose\."):
        engine.generate(PROMPTS[:1], SamplingSettings(max_new_tokens=4))


def test_a_refused_request_is_not_retried(connect, servers):
    engine = connect()
    for server in servers:
        server.generate_status = 400
    with pytest.raises(UserError, match="refused a request: broken on purpose"):
        engine.generate(PROMPTS, SETTINGS)


def test_a_restarted_server_gets_the_weights_before_it_is_used(connect, servers, checkpoint):
    engine = connect()
    changed = {name: tensor + 2 for name, tensor in WEIGHTS.items()}
    engine.update_weights(iter(changed.items()), 1)
    engine.offer_weights(lambda: iter(changed.items()))
    expected = tokens(engine.generate(PROMPTS, SETTINGS))
    servers[0].dies_after = 0
    engine.generate(PROMPTS, SETTINGS)
    servers[0].come_back()
    servers[1].stop()
    assert tokens(engine.generate(PROMPTS, SETTINGS)) == expected
    assert torch.equal(servers[0].weights["w0"], changed["w0"])
    servers[1].come_back()
    report = engine.update_weights(iter(WEIGHTS.items()), 2)
    assert report.engines == 2
    assert torch.equal(servers[1].weights["w0"], WEIGHTS["w0"])


def test_restarted_servers_are_refused_if_the_weights_have_changed(connect, servers):
    engine = connect()
    weights = {name: tensor + 2 for name, tensor in WEIGHTS.items()}
    engine.update_weights(iter(weights.items()), 1)
    for offered, message in ((None, "but without the weights"), (weights, "weights of the last update are gone")):
        if offered:
            engine.offer_weights(lambda: iter({**weights, "w3": weights["w3"] + 1}.items()))
        for server in servers:
            server.version = "default"
        with pytest.raises(UserError, match=rf"{message}\. Continue with --resume\."):
            engine.generate(PROMPTS, SETTINGS)
    engine.update_weights(iter(weights.items()), 1)
    engine.generate(PROMPTS, SETTINGS)


def test_a_server_that_dies_in_an_update_is_used_again_after_the_next(connect, servers):
    engine = connect()

    def stream():
        for i, pair in enumerate(WEIGHTS.items()):
            if i == 3:
                servers[0].stop()
            yield pair

    assert engine.update_weights(stream(), 1).engines == 1
    rows = engine.generate(PROMPTS, SETTINGS)
    assert {c.weight_version for row in rows for c in row} == {1}
    servers[0].come_back()
    assert engine.update_weights(iter(WEIGHTS.items()), 2).engines == 2
    before = servers[0].calls["/inference/v1/generate"]
    engine.generate(PROMPTS, SETTINGS)
    assert servers[0].calls["/inference/v1/generate"] > before


def test_weights_that_differ_from_the_sent_ones_are_refused(connect, servers, monkeypatch):
    engine = connect()
    update = FakeServer.update

    def damaged(self, info):
        response = update(self, info)
        if self is servers[0] and self.updating and "w1" in self.updating:
            self.updating["w1"][2, 5] += 1e-3
        return response

    monkeypatch.setattr(FakeServer, "update", damaged)
    assert engine.update_weights(iter(WEIGHTS.items()), 1).engines == 1
    assert "weights differ" in engine.servers[0].failure
    servers[1].stop()
    with pytest.raises(UserError, match="weights differ"):
        engine.update_weights(iter(WEIGHTS.items()), 2)


def test_an_interrupted_update_can_be_repeated(connect, servers):
    engine = connect()

    def breaking():
        yield "w0", WEIGHTS["w0"]
        raise OSError("the trainer failed")

    with pytest.raises(OSError, match="the trainer failed"):
        engine.update_weights(breaking(), 1)
    with pytest.raises(UserError, match="without the weights"):
        engine.generate(PROMPTS, SETTINGS)
    assert engine.update_weights(iter(WEIGHTS.items()), 1).engines == 2
    engine.generate(PROMPTS, SETTINGS)


def test_an_open_update_of_another_trainer_is_abandoned(connect, servers):
    servers[0].updating = {"old": torch.zeros(3)}
    connect()
    assert set(servers[0].weights) == set(WEIGHTS)


def test_an_unreachable_server_at_the_start(connect, servers):
    servers[1].stop()
    start = time.perf_counter()
    with pytest.raises(UserError, match=rf"no rollout server responds: {servers[1].url} \(.*refused\)\."):
        connect()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"dtype": "bfloat16"},
            r"but the recipe's dtype is float32\. Start it with --dtype float32\.",
        ),
        ({"transfer": "nccl"}, r"started with nccl\. Restart it with --weight-transfer host\."),
    ],
)
def test_a_server_with_other_settings_is_refused(connect, servers, facts, message):
    for server in servers:
        server.facts |= facts
    with pytest.raises(UserError, match=message):
        connect(weight_transfer="shared_memory")


def test_a_server_with_a_short_context_or_without_routing_is_refused(connect, servers):
    servers[0].length = 256
    with pytest.raises(UserError, match=r"max_model_length 256 is less than rollout\.max_model_length 512"):
        connect()
    servers[0].length = 512
    with pytest.raises(UserError, match="returns no routed experts"):
        connect(return_routing=True)


def test_another_kind_of_server_is_refused(connect, servers, monkeypatch):
    monkeypatch.setattr(FakeServer, "respond", lambda self, path, body: {"data": [{"id": "x", "max_model_len": 9}]})
    with pytest.raises(UserError, match=r"is not an align rollout server\. Start one with `align serve-rollout`"):
        connect()


def test_prompts_are_checked_before_any_request(connect, servers):
    engine = connect()
    with pytest.raises(UserError, match=r"prompt 0: its 510 tokens .*max_model_length 512"):
        engine.generate([[1] * 510], SETTINGS)
    with pytest.raises(UserError, match="empty"):
        engine.generate([[]], SETTINGS)
    assert not servers[0].calls["/inference/v1/generate"]


def test_closing_deletes_the_shared_memory(connect):
    engine = connect()
    files = [Path(path) for _, path in engine._delivery[2]._files]
    assert all(path.exists() for path in files)
    engine.close()
    assert not any(path.exists() for path in files)


def test_the_stream_of_a_checkpoint_omits_a_tied_head(checkpoint):
    save_file({**WEIGHTS, "lm_head.weight": torch.zeros(2)}, checkpoint / "model.safetensors")
    assert {name for name, _ in checkpoint_weights(checkpoint)} == set(WEIGHTS)
    (checkpoint / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert {name for name, _ in checkpoint_weights(checkpoint)} == {*WEIGHTS, "lm_head.weight"}
