"""Client and server of the scoring protocol, and servers that fail in many ways. No request may hang."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from align.config.rewards import RemoteReward
from align.data.prepare import PromptRow
from align.errors import UserError
from align.reward import json_http
from align.reward.components import Samples, build_component
from align.reward.process import FunctionProcess
from align.reward.remote import RewardClient
from align.reward.server import BadRequest, PromptCompletion, RewardServer
from align.rollout.base import Completion
from tests.chat_templates import SHAPES, tokenizer_for

REQUEST = {"prompts": ["p", "q"], "completions": ["a", "bb"], "finished": [True, False]}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_http, "FIRST_PAUSE_S", 0.05)


@contextmanager
def serving(scoring: Callable[[list[PromptCompletion]], list[float]]) -> Iterator[RewardServer]:
    with RewardServer("127.0.0.1", 0, scoring, {"tokenizer": "abc"}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def raw_server(respond: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads the start of a request and then passes the connection to `respond`."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.recv(65536)
                respond(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        thread.join()
        listener.close()


def client(url: str, timeout_s: float = 5.0, retries: int = 0) -> RewardClient:
    return RewardClient(url, timeout_s=timeout_s, retries=retries)


def post(server: RewardServer, body: str, path: str = "/score", headers: dict | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.request("POST", path, body, headers or {})
    response = connection.getresponse()
    result = response.status, json.loads(response.read())
    connection.close()
    return result


def test_completions_arrive_as_they_were_sent() -> None:
    seen: list[PromptCompletion] = []

    def scoring(items: list[PromptCompletion]) -> list[float]:
        seen.extend(items)
        return [float(len(item.completion)) for item in items]

    with serving(scoring) as server:
        sender = client(server.url)
        assert sender.health() == {"status": "ok", "tokenizer": "abc"}
        assert sender.score(REQUEST) == [1.0, 2.0]
        assert sender.score({"prompts": [[1, 2]], "completions": [[3, 4, 5]]}) == [3.0]
        assert sender.score({"prompts": [], "completions": []}) == []
        variables = {"enable_thinking": False, "tools": [{"type": "function"}]}
        sender.score({"prompts": ["p"], "completions": ["a"], "chat_template_kwargs": [variables]})
    user = [{"role": "user", "content": "p"}]
    assert seen[0] == PromptCompletion(user, "a", finished=True)
    assert seen[1].finished is False
    assert seen[2] == PromptCompletion([1, 2], [3, 4, 5], finished=True)
    assert seen[3] == PromptCompletion(user, "a", finished=True, variables=variables)


def test_texts_are_sent_with_the_template_variables_of_their_rows() -> None:
    seen = list[PromptCompletion]()

    def scoring(items: list[PromptCompletion]) -> list[float]:
        seen.extend(items)
        return [0.0] * len(items)

    user = [{"role": "user", "content": "p"}]
    rows = [PromptRow((1,), user, None, {}, {"enable_thinking": False}), PromptRow((1,), user, None, {})]
    tokenizer = tokenizer_for(SHAPES["qwen3"])
    completions = [Completion([1], [5], [0.0], True, 0)] * 2
    with serving(scoring) as server, closing(FunctionProcess()) as process:
        component = build_component(RemoteReward(kind="remote", url=server.url), process, tokenizer)
        component(Samples(rows, completions, tokenizer))
    assert [item.variables for item in seen] == [{"enable_thinking": False}, {}]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must be an object"),
        ("{}", "must be lists"),
        ('{"prompts": ["p"], "completions": []}', "of the same length"),
        ('{"prompts": ["p"], "completions": ["c"], "finished": [1]}', "finished[0]"),
        ('{"prompts": [[]], "completions": ["c"]}', "prompts[0]"),
        ('{"prompts": [[1]], "completions": ["c"]}', "prompts[0]"),
        ('{"prompts": ["p"], "completions": [[1]]}', "both be token ids"),
        ('{"prompts": [[1]], "completions": [[true]]}', "both be token ids"),
        ('{"prompts": [[{"role": "user"}]], "completions": ["c"]}', "role and content"),
        ('{"prompts": ["p"], "completions": [null]}', "completions[0]"),
        (
            '{"prompts": ["p"], "completions": ["c"], "chat_template_kwargs": {}}',
            "an object per completion",
        ),
        ('{"prompts": ["p"], "completions": ["c"], "chat_template_kwargs": [1]}', "chat_template_kwargs[0]"),
        ('{"prompts": ["p"], "completions": ["c"], "chat_template_kwargs": [{"tokenize": 1}]}', "variables of the"),
    ],
)
def test_a_bad_request_gets_the_reason(request_: str, reason: str) -> None:
    with serving(lambda items: [0.0] * len(items)) as server:
        status, response = post(server, request_)
        assert status == 400
        assert reason in response["error"]
        assert post(server, json.dumps(REQUEST))[0] == 200  # the server keeps working


def test_other_paths_and_sizes_are_refused() -> None:
    with serving(lambda items: [0.0] * len(items)) as server:
        assert post(server, "{}", path="/v1/score")[0] == 404
        assert post(server, "", headers={"Content-Length": "99999999999"})[0] == 400


def test_a_port_in_use_is_a_users_error() -> None:
    with (
        serving(lambda items: []) as server,
        pytest.raises(UserError, match=r"cannot listen there .*\. Pass another --port"),
    ):
        RewardServer("127.0.0.1", server.server_port, lambda items: [], {})


def test_scores_that_are_not_finite_numbers_are_missing() -> None:
    with serving(lambda items: [float("nan"), 1.5]) as server:
        assert client(server.url).score(REQUEST) == [None, 1.5]
    for scores in ("[NaN, 1.5]", "[null, 1.5]", '["1", 1.5]', "[true, 1.5]", f"[1{'0' * 400}, 1.5]"):
        with raw_server(lambda connection, body=scores: reply(connection, f'{{"scores": {body}}}')) as url:
            assert client(url).score(REQUEST) == [None, 1.5], scores


def reply(connection: socket.socket, body: str, status: str = "200 OK") -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())


def test_no_server_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError) as caught:
        client(f"http://127.0.0.1:{port}", retries=2).health()
    assert str(caught.value) == (
        f"reward server http://127.0.0.1:{port}: no response (Connection refused) in 3 tries and 0 s. Start it with "
        "`align serve-reward`, or set the reward's `url` to a running server."
    )


def test_a_request_is_retried_until_the_server_works() -> None:
    calls = []

    def scoring(items: list[PromptCompletion]) -> list[float]:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("out of memory")
        return [1.0] * len(items)

    with serving(scoring) as server:
        assert client(server.url, retries=2).score(REQUEST) == [1.0, 1.0]
        calls.clear()
        with pytest.raises(UserError, match=r"no response \(status 500: RuntimeError: out of memory\) in 2 tries"):
            client(server.url, retries=1).score(REQUEST)


def test_a_refused_request_is_not_retried() -> None:
    calls = []

    def scoring(items: list[PromptCompletion]) -> list[float]:
        calls.append(1)
        raise BadRequest("too long")

    with (
        serving(scoring) as server,
        pytest.raises(UserError, match=r"refused the request with status 400 \(too long\)"),
    ):
        client(server.url, retries=5).score(REQUEST)
    assert len(calls) == 1


def dribble(connection: socket.socket) -> None:
    """Send a byte every tenth of a second, which restarts a socket's own timeout each time."""
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(50):
            connection.sendall(b" ")
            time.sleep(0.1)
    except OSError:
        pass


def dribble_headers(connection: socket.socket) -> None:
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(50):
            connection.sendall(b"X: y\r\n")
            time.sleep(0.1)
    except OSError:
        pass


@pytest.mark.parametrize("respond", [lambda connection: time.sleep(1.5), dribble, dribble_headers])
def test_a_request_ends_in_time(respond) -> None:
    with raw_server(respond) as url:
        start = time.perf_counter()
        with pytest.raises(UserError, match=r"within 0\.5 s"):
            client(url, timeout_s=0.5).score(REQUEST)
        assert time.perf_counter() - start < 1.2


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        (lambda c: None, "no response .Remote end closed connection"),
        (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"), "no complete response"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH\r\n"), "no response"),
        (lambda c: reply(c, "hello"), "it returned no list of scores"),
        (lambda c: reply(c, '{"scores": [1.0]}'), "it returned 1 instead of 2 scores"),
        (lambda c: reply(c, '{"scores": 3}'), "no list of scores"),
        (lambda c: reply(c, "", "301 Moved"), "refused the request with status 301"),
        (lambda c: reply(c, "busy", "503 Busy"), "no response .status 503"),
    ],
)
def test_responses_without_scores(respond, reason: str) -> None:
    with raw_server(respond) as url, pytest.raises(UserError, match=reason):
        client(url).score(REQUEST)


def test_a_server_without_health_has_an_empty_description() -> None:
    with raw_server(lambda c: reply(c, "{}", "404 Not Found")) as url:
        assert client(url).health() == {}


def test_a_client_that_closes_its_connection_does_not_disturb_the_server(capfd) -> None:
    with serving(lambda items: [0.0] * len(items)) as server:
        for start in (b"", b"POST /score HTTP/1.1\r\nContent-Length: 50\r\n\r\n{", b"\x16\x03\x01\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                connection.sendall(start)
        assert client(server.url).score(REQUEST) == [0.0, 0.0]
    assert "Traceback" not in capfd.readouterr().err
