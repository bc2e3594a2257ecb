"""`align serve` over HTTP: each model's log-probabilities equal those of transformers and PEFT, whatever else runs."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed")
from tests.unit.serve.served import STACKS, Served, logprobs_by_peft, save_adapter, save_base

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]
TOKEN = "a-secret"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION, "rank": 8},
    "experts": {"target_parameters": STACKS, "rank": 4},
    "all": {
        "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
        "target_parameters": STACKS,
        "rank": 1,
    },
    "gate-up": {"target_parameters": STACKS[:1], "rank": 16},
    "down": {"target_parameters": STACKS[1:], "rank": 2},
}
STARTED = ("attention", "experts")
PROMPT = [5, 6, 7, 8, 9, 20, 33, 41]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_base(folder / "base")
    for seed, (name, targets) in enumerate(TARGETS.items()):
        save_adapter(folder / "base", folder / "adapters" / name, seed=seed, **targets)
    damage(folder / "adapters")
    (folder / "elsewhere").mkdir()
    shutil.copytree(folder / "adapters" / "down", folder / "elsewhere" / "down")
    (folder / "adapters" / "link").symlink_to(folder / "elsewhere" / "down")
    (folder / "token").write_text(f"{TOKEN}\n")
    return folder


def damage(adapters: Path) -> None:
    """Write bad adapters beside the good ones."""

    def changed(name: str, change: Any, **settings: Any) -> None:
        shutil.copytree(adapters / "attention", adapters / name)
        tensors = load_file(adapters / name / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapters / name / "adapter_model.safetensors")
        path = adapters / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changed("nan", lambda tensors: tensors[first].fill_(float("nan")))
    changed("huge", lambda tensors: tensors[first].fill_(1e30))
    changed("hidden", lambda tensors: tensors.update({first: torch.ones(8, 48)}))
    changed("no-b", lambda tensors: tensors.pop(first.replace("lora_A", "lora_B")))
    changed("layers", lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.3." in name])
    router = {"base_model.model.model.layers.0.mlp.gate.weight": torch.ones(8, 64)}
    changed("router", lambda tensors: tensors.update(router))
    changed("dora", lambda tensors: None, use_dora=True)
    changed("pissa", lambda tensors: None, init_lora_weights="pissa")
    changed("rank", widen, r=32)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    """Give every factor the rank 32."""
    for name, tensor in list(tensors.items()):
        tensors[name] = torch.ones(32, tensor.shape[1]) if "lora_A" in name else torch.ones(tensor.shape[0], 32)


REFUSED = {
    "nan": "infinite or not a number",
    "huge": "values up to 1e+30",
    "hidden": "the factors of 'model.layers.0.self_attn.q_proj' have the shapes [8, 48]",
    "no-b": "has no lora_B",
    "layers": "it has no factors for 'model.layers.3.",
    "router": "it trains in full: router",
    "dora": "use_dora",
    "pissa": "init_lora_weights is 'pissa'",
    "rank": "its rank 32 exceeds --max-rank 16",
    "link": "is a link out of the adapters' folder",
    "missing": "the adapters' folder has no 'missing'",
}


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    adapters = [word for name in STARTED for word in ("--adapter", f"{name}={folder / 'adapters' / name}")]
    served = Served(
        str(folder / "base"),
        *adapters,
        *("--adapters-dir", str(folder / "adapters"), "--token-file", str(folder / "token"), "--max-adapters", "4"),
        *("--max-model-length", "128", "--cache-gib", "0.05", "--max-rank", "16"),
        token=TOKEN,
    )
    try:
        served.wait()
        yield served
        output = served.stop()
        assert served.process.returncode == 0, output
        assert "proof: 3 models" in output
        assert "serving base, attention, experts at http://127.0.0.1:" in output
    finally:
        served.process.kill()


def complete(server: Served, model: str, **more: Any) -> tuple[list[int], list[float]]:
    """(tokens, log-probabilities) of the prompt after its first token and of a greedy completion."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    status, answer = server.request(
        "POST", "/v1/completions", {**body, "prompt_logprobs": 0, "return_token_ids": True, **more}
    )
    assert status == 200, answer
    (choice,) = answer["choices"]
    prompt = [at[str(token)]["logprob"] for at, token in zip(choice["prompt_logprobs"][1:], PROMPT[1:])]
    assert answer["model"] == model
    return choice["token_ids"], [*prompt, *choice["logprobs"]["token_logprobs"]]


def assert_exact(server: Served, folder: Path, model: str) -> list[float]:
    tokens, logprobs = complete(server, model)
    expected = logprobs_by_peft(
        folder / "base", folder / "adapters" / model if model in TARGETS else None, PROMPT + tokens
    )
    assert max(abs(a - b) for a, b in zip(logprobs, expected, strict=True)) < 1e-4
    return logprobs


def test_models_have_the_log_probabilities_of_transformers_and_peft(server: Served, folder: Path) -> None:
    found = {model: assert_exact(server, folder, model) for model in ("base", *STARTED)}
    for name in STARTED:
        assert max(abs(a - b) for a, b in zip(found[name], found["base"])) > 0.1


def test_a_mixed_batch_gives_each_request_its_own_model(server: Served, folder: Path) -> None:
    models = ["base", "experts", "attention", "base", "attention", "experts", "base", "experts"]
    expected = {model: complete(server, model) for model in set(models)}
    with ThreadPoolExecutor(len(models)) as pool:
        for _ in range(3):
            for model, (tokens, logprobs) in zip(models, pool.map(lambda name: complete(server, name), models)):
                assert tokens == expected[model][0]
                assert max(abs(a - b) for a, b in zip(logprobs, expected[model][1])) < 1e-4


def test_adapters_are_loaded_replaced_and_unloaded_while_others_run(server: Served, folder: Path) -> None:
    """Ranks 1, 2 and 16; factors on one of the experts' stacks only."""
    running = threading.Event()
    wrong: list[str] = []
    expected = complete(server, "experts")

    def keep_running() -> None:
        while not running.is_set():
            tokens, logprobs = complete(server, "experts")
            if tokens != expected[0] or max(abs(a - b) for a, b in zip(logprobs, expected[1])) > 1e-4:
                wrong.append(str(tokens))

    thread = threading.Thread(target=keep_running)
    thread.start()
    try:
        for name in ("all", "gate-up", "down", "all"):
            assert server.load(name) == (200, {"object": "adapter", "id": name, "status": "loaded"})
            assert_exact(server, folder, name)
            assert_exact(server, folder, "base")
            assert server.unload(name)[0] == 200
            status, answer = server.request("POST", "/v1/completions", {"model": name, "prompt": "a"})
            assert status == 404
            assert answer["error"]["message"].startswith(f"model: '{name}' is not served; send one of: base, ")
        # The name `swap` means another adapter after each load.
        for name in ("down", "gate-up", "all"):
            assert server.load("swap", lora_path=name, load_inplace=True)[0] == 200
            tokens, logprobs = complete(server, "swap")
            by_peft = logprobs_by_peft(folder / "base", folder / "adapters" / name, PROMPT + tokens)
            assert max(abs(a - b) for a, b in zip(logprobs, by_peft, strict=True)) < 1e-4
        assert server.unload("swap")[0] == 200
    finally:
        running.set()
        thread.join()
    assert not wrong


def test_bad_adapters_are_refused_in_one_sentence_and_the_server_lives(server: Served, folder: Path) -> None:
    before = complete(server, "base")
    for name, reason in REFUSED.items():
        started = time.monotonic()
        status, answer = server.load(name)
        assert status == 400, (name, answer)
        assert reason in answer["error"]["message"], (name, answer)
        assert "\n" not in answer["error"]["message"]
        assert time.monotonic() - started < 30
    for body in ({"lora_name": "down", "lora_path": str(folder / "elsewhere" / "down")}, {"lora_name": "../elsewhere"}):
        status, answer = server.request("POST", "/v1/load_lora_adapter", body)
        assert status == 400
        assert "is not a valid name" in answer["error"]["message"]
    assert server.unload("nan")[0] == 400
    for name in ("down", "gate-up"):
        assert server.load(name)[0] == 200
    status, answer = server.load("all")
    assert status == 400
    assert "the server holds 4 adapters" in answer["error"]["message"]
    assert_exact(server, folder, "down")
    for name in ("down", "gate-up"):
        assert server.unload(name)[0] == 200
    assert complete(server, "base") == before


def test_only_the_token_opens_the_server(server: Served) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/v1/responses"):
        for header in ("", "Bearer wrong", f"Basic {TOKEN}", TOKEN):
            status, _ = server.request("GET", path, Authorization=header)
            assert status == 401, (path, header)
    for method, path in (("GET", "/docs"), ("POST", "/v1/responses"), ("POST", "/sleep"), ("POST", "/v1/embeddings")):
        assert server.request(method, path, {})[0] == 404
    assert server.request("GET", "/health", Authorization="")[0] == 200
    status, answer = server.request("GET", "/v1/models")
    assert status == 200
    assert [(card["id"], card["parent"]) for card in answer["data"]] == [
        ("base", None),
        ("attention", "base"),
        ("experts", "base"),
    ]
    assert server.request("GET", "/v1/models/experts")[1]["id"] == "experts"
    status, page = server.request("GET", "/metrics")
    assert status == 200
    for metric in ('align_requests_total{model="base",status="200"}', "vllm:generation_tokens_total", "align_adapters"):
        assert metric in page


def test_chats_stream_and_stop_at_the_end_of_the_turn(server: Served) -> None:
    messages = [{"role": "user", "content": "What is 3?"}]
    body = {"model": "experts", "messages": messages, "max_tokens": 16, "temperature": 0, "logprobs": True}
    status, whole = server.request("POST", "/v1/chat/completions", body)
    assert status == 200
    events = list(server.stream("/v1/chat/completions", body))
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert len(events) > 3
    streamed = [
        entry["logprob"]
        for event in events
        for choice in event["choices"]
        if choice.get("logprobs")
        for entry in choice["logprobs"]["content"]
    ]
    expected = [entry["logprob"] for entry in whole["choices"][0]["logprobs"]["content"]]
    assert streamed == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "nobody"}, 404, "model: 'nobody' is not served"),
        ({}, 404, "model: it is missing"),
        (
            {"model": "base", "tools": [{"type": "function", "function": {"name": "f"}}]},
            400,
            "tools: the chat template does not render tools and their calls",
        ),
        ({"model": "base", "functions": [{"name": "f"}]}, 400, "functions: the server does not know this field"),
        ({"model": "base", "temprature": 0.5}, 400, "temprature: the server does not know this field"),
        ({"model": "base", "temperature": 0.001}, 400, "below vLLM's lowest, 0.01"),
        ({"model": "base\x1f1"}, 404, "is not served"),
    ],
)
def test_requests_that_would_be_misunderstood_are_refused(
    server: Served, body: dict[str, Any], status: int, message: str
) -> None:
    messages = [{"role": "user", "content": "a"}]
    found, answer = server.request("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 2, **body})
    assert found == status
    assert message in answer["error"]["message"]
    metadata = {"model": "base", "messages": messages, "max_tokens": 2, "metadata": {"a": "b"}}
    assert server.request("POST", "/v1/chat/completions", metadata)[0] == 200


def test_clients_that_disconnect_leave_no_adapter_behind(server: Served, folder: Path) -> None:
    assert server.load("down")[0] == 200
    for _ in range(3):
        connection = server.connect()
        body = {"model": "down", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), server.headers())
        connection.getresponse().readline()
        connection.close()
    assert server.unload("down")[0] == 200
    assert_exact(server, folder, "experts")


def test_a_chat_in_the_terminal(server: Served, folder: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "align.cli", "chat", "--url", f"http://127.0.0.1:{server.port}"]
    options = ["--token-file", str(folder / "token"), "--model", "experts", "--temperature", "0"]
    done = subprocess.run(
        [*command, *options, "--max-new-tokens", "8"], input="What is 3?\nAnd 4?\n\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    messages = [{"role": "user", "content": "What is 3?"}]
    body = {"model": "experts", "messages": messages, "max_tokens": 8, "temperature": 0, "seed": 0}
    answer = server.request("POST", "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    assert done.stdout.startswith(f"{answer}\n")


# The last test of the module: it stops the server.
def test_sigterm_lets_running_requests_finish(server: Served) -> None:
    found: list[tuple[int, Any]] = []

    def run() -> None:
        body = {"model": "attention", "prompt": PROMPT, "max_tokens": 110, "ignore_eos": True, "temperature": 0}
        found.append(server.request("POST", "/v1/completions", body))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.process.terminate()
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [200] * 3
    assert all(answer["usage"]["completion_tokens"] == 110 for _, answer in found)
    assert server.process.wait(60) == 0
