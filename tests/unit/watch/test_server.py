"""The server of the live page: token, host names, headers, responses, the command's refusals."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.errors import UserError
from align.watch import server as module
from align.watch.server import WatchServer, in_order
from tests.unit.watch.made_runs import ATTACK, start, write_long, write_ppo

Get = Callable[..., tuple[http.client.HTTPResponse, bytes]]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Get]]:
    """serve(token) starts a server of tmp_path and returns get(path, **headers)."""
    servers = []

    def serve(token: str | None = None, host: str = "127.0.0.1") -> Get:
        server = WatchServer(tmp_path, host, 0, token)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

        def get(path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read()
            connection.close()
            return response, body

        return get

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_state_and_curves(tmp_path: Path, served: Callable[..., Get]) -> None:
    write_long(tmp_path / "a", 3000)
    write_ppo(tmp_path / "b")
    get = served()
    state: dict[str, Any] = {"more": True}
    while state["more"]:
        state = json.loads(get("/state")[1])
    assert [run["id"] for run in state["runs"]] == ["a", "b"]
    curves = json.loads(get("/curves?run=a&stage=sft")[1])
    loss = curves["charts"][0]["series"][0]
    assert curves["charts"][0]["title"] == "Loss"
    assert 512 <= len(loss["x"]) <= 1030
    assert loss["x"][-1] == 3000
    assert json.loads(get("/samples?run=b&stage=ppo")[1])["samples"][0]["prompt"] == ATTACK
    assert len(json.loads(get("/experts?run=a&stage=sft&layer=1")[1])["last"]) == 2
    only = json.loads(get("/state?run=b&run=gone")[1])["runs"]
    assert [run["stages"] is None for run in only] == [True, False]


def test_the_page_waits_a_hundred_times_the_cpu_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path / "a")
    clock = {"monotonic": 50.0, "process_time": 3.0}
    for name in clock:
        monkeypatch.setattr(module.time, name, lambda name=name: clock[name])
    live = module.Live(tmp_path)

    def wait(**passed: float) -> float:
        for name, seconds in passed.items():
            clock[name] += seconds
        return float(live.respond("/state", {})["wait"])

    assert wait() == 0
    assert wait(process_time=0.04) == 4
    assert wait(monotonic=1, process_time=0.02) == 5  # of another client, whose requests count too
    assert wait(monotonic=9, process_time=0.01) == 1
    assert wait(process_time=7) == 10
    monkeypatch.setattr(live.watched, "read", lambda *_: True)
    assert wait(process_time=7) == 0  # long files are read without a pause
    monkeypatch.setattr(live.watched, "read", lambda *_: False)
    assert wait(process_time=0.03) == 3


def test_at_first_the_newest_runs_are_shown(
    tmp_path: Path, served: Callable[..., Get], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SELECTED", 2)
    for name in ("run-10", "run-2", "run-1"):
        start(tmp_path / name)
        for file in (tmp_path / name).rglob("*"):
            os.utime(file, (1000 if name == "run-2" else 2000,) * 2)
    runs = json.loads(served()("/state")[1])["runs"]
    assert [(run["id"], run["stages"] is None) for run in runs] == [
        ("run-1", False),
        ("run-2", True),
        ("run-10", False),
    ]


def test_data_needs_the_token_and_the_page_has_none(tmp_path: Path, served: Callable[..., Get]) -> None:
    start(tmp_path / "secret-run")
    get = served(token="right")
    for path in ("/state", "/curves?run=secret-run&stage=sft", "/comparison?run=secret-run"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            response, body = get(path, **headers)
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert b"secret" not in body
    response, body = get("/")
    assert response.status == 200
    assert b"secret" not in body
    assert str(tmp_path).encode() not in body
    assert get("/state", Authorization="Bearer right")[0].status == 200


def test_another_host_name_is_refused_without_a_token(served: Callable[..., Get]) -> None:
    """A web site whose name points to 127.0.0.1 must not read the data."""
    get = served()
    for host in ("evil.example", "evil.example:8200", "127.0.0.1.evil.example", ""):
        assert get("/state", Host=host)[0].status == 403
        assert get("/", Host=host)[0].status == 403
    for host in ("localhost:8200", "127.0.0.1", "[::1]:8200"):
        assert get("/state", Host=host)[0].status == 200
    assert served(token="t")("/state", Host="node7:8200", Authorization="Bearer t")[0].status == 200


def test_headers_of_every_response(served: Callable[..., Get]) -> None:
    get = served()
    for path in ("/", "/state", "/nothing", "/../etc/passwd", "/curves", "/curves?run=..&stage=x"):
        response, _ = get(path)
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == "no-store"
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe-eval" not in policy
        assert "script-src 'unsafe-inline'" not in policy
        assert response.headers.get("Access-Control-Allow-Origin") is None
        assert response.status == (200 if path in ("/", "/state") else 404)
    response, body = get("/", method="HEAD")
    assert (response.status, body) == (200, b"")
    assert get("/state", method="POST")[0].status == 501


def test_a_head_request_has_no_body(tmp_path: Path) -> None:
    """Read from the socket, because http.client ignores such a body."""
    with WatchServer(tmp_path, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
            connection.sendall(b"HEAD /state HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        server.shutdown()
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.endswith(b"\r\n\r\n")


def test_long_responses_to_other_machines_are_compressed(
    tmp_path: Path, served: Callable[..., Get], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Handler, "_is_local", False)
    write_long(tmp_path / "a", 1000)
    get = served()
    get("/state")
    plain = get("/curves?run=a&stage=sft")[1]
    response, body = get("/curves?run=a&stage=sft", **{"Accept-Encoding": "gzip"})
    assert response.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == plain
    assert len(body) < len(plain) / 2


@pytest.mark.parametrize("path", ["/curves?run=gone&stage=sft", "/curves?run=a&stage=gone", "/samples", "/comparison"])
def test_what_is_gone_is_404(tmp_path: Path, served: Callable[..., Get], path: str) -> None:
    start(tmp_path / "a")
    get = served()
    get("/state")
    assert get(path)[0].status == 404


def test_a_port_in_use_is_an_error_of_the_user(tmp_path: Path) -> None:
    with WatchServer(tmp_path, "127.0.0.1", 0) as first, pytest.raises(UserError, match="cannot listen there"):
        WatchServer(tmp_path, "127.0.0.1", first.server_port)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "--host", "0.0.0.0"], "the server has no token"),
        (["{folder}/run/recipe.json"], "it is a file"),
        (["{folder}/run/sft"], "it is the folder of a stage; pass its run"),
        (["{folder}", "--token", "two words"], "the token is empty or has spaces"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("ALIGN_SERVE_TOKEN", raising=False)
    start(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main(["watch", *(argument.format(folder=tmp_path) for argument in arguments)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_names_with_numbers_are_in_their_order() -> None:
    names = ["run-10", "run-2", "beta=0.1", "beta=0.05", "x"]
    assert sorted(names, key=in_order) == ["beta=0.05", "beta=0.1", "run-2", "run-10", "x"]
