"""The gate in front of vLLM, with an engine that only records: who may enter, and how long an adapter stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
from align.config.rollout import Rollout
from align.serve import gate
from align.serve.command import adapter_base
from align.serve.gate import MAX_BODY, Gate
from align.serve.proof import COMPLETION, Probed
from align.serve.service import Service
from align.serve.settings import ServeSettings
from tests.unit.serve.served import save_adapter, save_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    save_base(folder / "base")
    for seed, name in enumerate(("a", "b")):
        save_adapter(folder / "base", folder / "adapters" / name, seed=seed, target_modules=["q_proj"])
    return folder


class Engine:
    """Records the adapters that it holds; answers probes with log-probabilities by adapter."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.most = 0
        self.values: Callable[[Any], float] = lambda request: -1.0 if request is None else -2.0
        self.fails = False

    async def add_lora(self, request: Any) -> bool:
        if self.fails:
            raise RuntimeError("out of memory")
        assert (Path(request.lora_path) / "adapter_model.safetensors").is_file()
        self.held[request.lora_int_id] = request.lora_path
        self.most = max(self.most, len(self.held))
        return True

    async def remove_lora(self, number: int) -> bool:
        return self.held.pop(number, None) is not None

    async def check_health(self) -> None: ...

    async def generate(self, prompt: Any, sampling: Any, number: str, *, lora_request: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        value = self.values(lora_request)
        ids = prompt["prompt_token_ids"]
        prompt_logprobs = [None, *({token: SimpleNamespace(logprob=value)} for token in ids[1:])]
        sampled = SimpleNamespace(
            token_ids=[1] * COMPLETION, logprobs=[{1: SimpleNamespace(logprob=value)}] * COMPLETION
        )
        yield SimpleNamespace(prompt_logprobs=prompt_logprobs, outputs=[sampled])


class Application:
    """vLLM's application: answers with the model of the request after `release` is set."""

    def __init__(self, engine: Engine):
        self.models = SimpleNamespace(lora_requests={})
        self.state = SimpleNamespace(engine_client=engine, openai_serving_models=self.models)
        self.release = asyncio.Event()
        self.release.set()
        self.started = 0
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            return
        body = (await receive())["body"]
        if scope["method"] == "POST":
            assert dict(scope["headers"])[b"content-length"] == str(len(body)).encode()
        self.bodies.append(json.loads(body or b"{}"))
        self.started += 1
        await self.release.wait()
        await gate.respond(send, 200, {"model": self.bodies[-1].get("model")})


class Client:
    def __init__(self, entered: Gate, application: Application):
        self.gate, self.application = entered, application

    async def __call__(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        sent: list[dict[str, Any]] = []
        waiting = [content[:100], content[100:]]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

        async def send(message: Any) -> None:
            sent.append(message)

        given = {"content-type": "application/json", "content-length": str(len(content))} | (headers or {})
        pairs = [(name.encode(), value.encode()) for name, value in given.items()]
        await self.gate({"type": "http", "method": method, "path": path, "headers": pairs}, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    async def load(self, name: str, **more: Any) -> tuple[int, Any]:
        return await self("POST", "/v1/load_lora_adapter", {"lora_name": name, **more})

    async def unload(self, name: str) -> tuple[int, Any]:
        return await self("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def complete(self, model: str, **more: Any) -> tuple[int, Any]:
        return await self("POST", "/v1/completions", {"model": model, "prompt": "x", **more})


def run(
    folder: Path,
    tmp_path: Path,
    test: Any,
    engine: Engine | None = None,
    *,
    expected: Any = None,
    no_tools: str | None = None,
    **changes: Any,
) -> list[Any]:
    """Run an asynchronous test on a started gate; returns the messages of the start."""
    values: dict[str, Any] = {
        "checkpoint": folder / "base",
        "name": "base",
        "adapters": {},
        "adapters_dir": folder / "adapters",
        "max_adapters": 2,
        "max_rank": 16,
        "host": "127.0.0.1",
        "port": 1,
        "token": None,
        "dtype": "float32",
        "tool_parser": None,
        "drain_seconds": 0,
        "proof": False,
        "rollout": Rollout(),
    }
    settings = ServeSettings(**(values | changes))
    service = Service(
        settings,
        adapter_base(folder / "base", "float32"),
        tmp_path,
        expected=expected,
        stop_tokens=[2],
        vocabulary=100,
        no_tools=no_tools,
    )
    engine = engine or Engine()
    messages: list[Any] = []

    async def main() -> None:
        application = Application(engine)
        gate.install(service)
        entered = Gate.__new__(Gate)
        metrics = SimpleNamespace(
            requests=SimpleNamespace(labels=lambda *_: SimpleNamespace(inc=lambda: None)),
            loaded=SimpleNamespace(set=lambda _: None),
            adapter=lambda *_: None,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gate, "Metrics", lambda: metrics)
            entered.__init__(application)  # type: ignore[misc]

        async def receive() -> dict[str, Any]:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            messages.append(message)

        await entered({"type": "lifespan", "app": application}, receive, send)
        if test is not None:
            await test(Client(entered, application), engine)

    asyncio.run(asyncio.wait_for(main(), 60))
    return messages


def test_a_request_keeps_its_adapter_until_its_response_is_complete(folder: Path, tmp_path: Path) -> None:
    async def test(client: Client, engine: Engine) -> None:
        application = client.application
        assert (await client.load("a"))[0] == 200
        (number,) = engine.held
        application.release.clear()
        request = asyncio.create_task(client.complete("a"))
        await until(lambda: application.started == 1)
        unload = asyncio.create_task(client.unload("a"))
        await asyncio.sleep(0.05)
        assert not unload.done()
        assert number in engine.held
        assert (await client.complete("a"))[0] == 404  # takes no new requests
        assert application.bodies[0]["model"] in application.models.lora_requests
        application.release.set()
        assert await request == (200, {"model": application.bodies[0]["model"]})
        assert (await unload)[0] == 200
        assert not engine.held
        assert not application.models.lora_requests
        assert not list(tmp_path.iterdir())

    run(folder, tmp_path, test)


def test_a_replaced_adapter_answers_only_the_requests_that_it_has(folder: Path, tmp_path: Path) -> None:
    async def test(client: Client, engine: Engine) -> None:
        application = client.application
        await client.load("x", lora_path="a")
        assert (await client.load("x", lora_path="b"))[0] == 400
        application.release.clear()
        old = asyncio.create_task(client.complete("x"))
        await until(lambda: application.started == 1)
        replacing = asyncio.create_task(client.load("x", lora_path="b", load_inplace=True))
        await until(lambda: len(application.models.lora_requests) == 2)
        new = asyncio.create_task(client.complete("x"))
        await until(lambda: application.started == 2)
        paths = [application.models.lora_requests[body["model"]].lora_path for body in application.bodies]
        assert paths[0] != paths[1]
        application.release.set()
        await asyncio.gather(old, new, replacing)
        assert list(engine.held.values()) == [paths[1]]

    run(folder, tmp_path, test)


def test_the_engine_never_holds_more_adapters_than_it_has_slots(folder: Path, tmp_path: Path) -> None:
    async def test(client: Client, engine: Engine) -> None:
        application = client.application
        for turn in range(6):
            application.release.clear()
            await client.load("x", lora_path="ab"[turn % 2], load_inplace=True)
            await client.load("y", lora_path="b")
            requests = [asyncio.create_task(client.complete(name)) for name in ("x", "y")]
            await until(lambda expected=2 * turn + 2: application.started == expected)
            waiting = [asyncio.create_task(client.unload("y"))]
            await asyncio.sleep(0)
            for name in ("z", "w"):
                waiting.append(asyncio.create_task(client.load(name, lora_path="a")))
            await asyncio.sleep(0.05)
            application.release.set()
            await asyncio.gather(*requests, *waiting)
            for name in ("z", "w"):
                await client.unload(name)
        # One slot of `ServeSettings.slots` stays empty.
        assert 2 <= engine.most <= 2 + 1

    run(folder, tmp_path, test)


def test_an_adapter_that_the_engine_refuses_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    async def test(client: Client, engine: Engine) -> None:
        engine.values = lambda request: -1.0 if request is None else float("nan")
        status, answer = await client.load("a")
        assert status == 400
        assert "are not finite" in answer["error"]["message"]
        engine.values = lambda request: -1.0
        status, answer = await client.load("a")
        assert status == 400
        assert "log-probabilities are the base model's" in answer["error"]["message"]
        engine.fails = True
        status, answer = await client.load("a")
        assert (status, answer["error"]["message"].split(" (")[1][:13]) == (500, "out of memory")
        assert not engine.held
        assert not list(tmp_path.iterdir())
        engine.fails, engine.values = False, lambda request: -2.0 if request else -1.0
        assert (await client.load("a"))[0] == 200

    run(folder, tmp_path, test)


def test_requests_need_the_token_a_listed_route_and_json(folder: Path, tmp_path: Path) -> None:
    async def test(client: Client, engine: Engine) -> None:
        right = {"authorization": "Bearer secret"}
        body = {"model": "base", "prompt": "x"}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            assert (await client("POST", "/v1/completions", body, headers=headers))[0] == 401
        assert (await client("GET", "/health"))[0] == 200
        assert (await client("POST", "/v1/completions", body, headers=right))[0] == 200
        assert (await client("POST", "/v1/responses", body, headers=right))[0] == 404
        text = {"content-type": "text/plain"}
        assert (await client("POST", "/v1/completions", body, headers=right | text))[0] == 415
        assert (await client("POST", "/v1/completions", b"[1]", headers=right))[0] == 400
        assert (await client("POST", "/v1/completions", b"x" * (MAX_BODY + 1), headers=right))[0] == 413

    run(folder, tmp_path, test, token="secret")


def test_chats_get_the_tokens_that_end_a_turn(folder: Path, tmp_path: Path) -> None:
    async def test(client: Client, engine: Engine) -> None:
        chat: dict[str, Any] = {"model": "base", "messages": []}
        await client("POST", "/v1/chat/completions", chat | {"stop_token_ids": [9], "metadata": {}})
        assert client.application.bodies[-1] == chat | {"stop_token_ids": [9, 2]}
        await client("POST", "/v1/chat/completions", chat | {"ignore_eos": True})
        assert "stop_token_ids" not in client.application.bodies[-1]

    run(folder, tmp_path, test)


def probed(value: float) -> Probed:
    return Probed([value] * 23, [1] * COMPLETION, [value] * COMPLETION)


@pytest.mark.parametrize(
    ("expected", "engine_value", "reason"),
    [
        ({"": -1.0, "a": -2.0}, -2.0, None),
        ({"": -1.01, "a": -2.0}, -2.0, "the base model: its log-probabilities differ from those of transformers by up"),
        ({"": -1.0, "a": -2.01}, -2.0, "adapter 'a': its log-probabilities differ from those of transformers and PEFT"),
        ({"": -1.0, "a": -1.0009}, -1.0001, "adapter 'a': the server does not apply it"),
    ],
)
def test_the_server_starts_only_if_its_models_are_the_reference(
    folder: Path, tmp_path: Path, expected: dict[str, float], engine_value: float, reason: str | None
) -> None:
    engine = Engine()
    engine.values = lambda request: -1.0 if request is None else engine_value
    messages = run(
        folder,
        tmp_path,
        None,
        engine,
        expected={name: probed(value) for name, value in expected.items()},
        adapters={"a": folder / "adapters" / "a"},
    )
    assert messages[-1]["type"] == ("lifespan.startup.complete" if reason is None else "lifespan.startup.failed")
    assert reason is None or reason in messages[-1]["message"]


def test_without_a_folder_nothing_is_loaded_later(folder: Path, tmp_path: Path) -> None:
    async def test(client: Client, engine: Engine) -> None:
        status, answer = await client.load("a")
        assert status == 400
        assert "start it with --adapters-dir" in answer["error"]["message"]

    run(folder, tmp_path, test, adapters_dir=None)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_an_adapter_of_the_start_that_does_not_fit_stops_it(folder: Path, tmp_path: Path) -> None:
    messages = run(folder, tmp_path, None, adapters={"a": folder / "nowhere"})
    assert messages[-1]["type"] == "lifespan.startup.failed"
    assert "not an adapter" in messages[-1]["message"]
