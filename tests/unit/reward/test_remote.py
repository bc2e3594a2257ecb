"""Client and server of the scoring protocol, and a server's every way to fail. Nothing may hang."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from align.errors import UserError
from align.reward import remote
from align.reward.remote import RewardClient
from align.reward.server import BadRequest, Question, RewardServer

REQUEST = {"prompts": ["p", "q"], "completions": ["a", "bb"], "finished": [True, False]}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.05)


@contextmanager
def serving(scoring: Callable[[list[Question]], list[float]]) -> Iterator[RewardServer]:
    with RewardServer("127.0.0.1", 0, scoring, {"tokenizer": "abc"}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads a request's beginning and then does what it likes with the connection."""
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
                answer(connection)

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
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def test_questions_arrive_as_they_were_asked() -> None:
    seen: list[Question] = []

    def scoring(questions: list[Question]) -> list[float]:
        seen.extend(questions)
        return [float(len(question.completion)) for question in questions]

    with serving(scoring) as server:
        asking = client(server.url)
        assert asking.health() == {"status": "ok", "tokenizer": "abc"}
        assert asking.score(REQUEST) == [1.0, 2.0]
        assert asking.score({"prompts": [[1, 2]], "completions": [[3, 4, 5]]}) == [3.0]
        assert asking.score({"prompts": [], "completions": []}) == []
    user = [{"role": "user", "content": "p"}]
    assert seen[0] == Question(user, "a", finished=True)
    assert seen[1].finished is False
    assert seen[2] == Question([1, 2], [3, 4, 5], finished=True)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must be an object"),
        ("{}", "must be lists"),
        ('{"prompts": ["p"], "completions": []}', "of one length"),
        ('{"prompts": ["p"], "completions": ["c"], "finished": [1]}', "finished[0]"),
        ('{"prompts": [[]], "completions": ["c"]}', "prompts[0]"),
        ('{"prompts": [[1]], "completions": ["c"]}', "prompts[0]"),
        ('{"prompts": ["p"], "completions": [[1]]}', "both be token ids"),
        ('{"prompts": [[1]], "completions": [[true]]}', "both be token ids"),
        ('{"prompts": [[{"role": "user"}]], "completions": ["c"]}', "role and content"),
        ('{"prompts": ["p"], "completions": [null]}', "completions[0]"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(request_: str, said: str) -> None:
    with serving(lambda questions: [0.0] * len(questions)) as server:
        status, answer = post(server, request_)
        assert status == 400
        assert said in answer["error"]
        assert post(server, json.dumps(REQUEST))[0] == 200  # and the server lives on


def test_other_paths_and_sizes_are_refused() -> None:
    with serving(lambda questions: [0.0] * len(questions)) as server:
        assert post(server, "{}", path="/v1/score")[0] == 404
        assert post(server, "", headers={"Content-Length": "99999999999"})[0] == 400


def test_a_port_in_use_is_a_users_error() -> None:
    with (
        serving(lambda questions: []) as server,
        pytest.raises(UserError, match=r"cannot listen there .*; choose another --port"),
    ):
        RewardServer("127.0.0.1", server.server_port, lambda questions: [], {})


def test_scores_that_are_no_numbers_are_missing() -> None:
    with serving(lambda questions: [float("nan"), 1.5]) as server:
        assert client(server.url).score(REQUEST) == [None, 1.5]
    for scores in ("[NaN, 1.5]", "[null, 1.5]", '["1", 1.5]', "[true, 1.5]", f"[1{'0' * 400}, 1.5]"):
        with raw_server(lambda connection, body=scores: reply(connection, f'{{"scores": {body}}}')) as url:
            assert client(url).score(REQUEST) == [None, 1.5], scores


def reply(connection: socket.socket, body: str, status: str = "200 OK") -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError) as caught:
        client(f"http://127.0.0.1:{port}", retries=2).health()
    assert str(caught.value) == (
        f"reward server http://127.0.0.1:{port}: no answer (Connection refused) in 3 tries and 0 s; start it "
        "(`align serve-reward`), or correct the reward's `url`."
    )


def test_a_server_that_comes_back_is_asked_again() -> None:
    calls = []

    def scoring(questions: list[Question]) -> list[float]:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("out of memory")
        return [1.0] * len(questions)

    with serving(scoring) as server:
        assert client(server.url, retries=2).score(REQUEST) == [1.0, 1.0]
        calls.clear()
        with pytest.raises(UserError, match=r"no answer \(status 500: RuntimeError: out of memory\) in 2 tries"):
            client(server.url, retries=1).score(REQUEST)


def test_a_refusal_is_not_repeated() -> None:
    calls = []

    def scoring(questions: list[Question]) -> list[float]:
        calls.append(1)
        raise BadRequest("too long")

    with (
        serving(scoring) as server,
        pytest.raises(UserError, match=r"refused the request with status 400 \(too long\)"),
    ):
        client(server.url, retries=5).score(REQUEST)
    assert len(calls) == 1


def dribble(connection: socket.socket) -> None:
    """A byte every tenth of a second, for ever: a socket's own timeout never ends this."""
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


@pytest.mark.parametrize("answer", [lambda connection: time.sleep(1.5), dribble, dribble_headers])
def test_a_request_has_an_end(answer) -> None:
    with raw_server(answer) as url:
        start = time.perf_counter()
        with pytest.raises(UserError, match=r"within 0\.5 s"):
            client(url, timeout_s=0.5).score(REQUEST)
        assert time.perf_counter() - start < 1.2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda c: None, "no answer .Remote end closed connection"),
        (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"), "not the whole answer"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH\r\n"), "no answer"),
        (lambda c: reply(c, "hello"), "no list of scores for 2 completions"),
        (lambda c: reply(c, '{"scores": [1.0]}'), "1 scores for 2 completions"),
        (lambda c: reply(c, '{"scores": 3}'), "no list of scores"),
        (lambda c: reply(c, "", "301 Moved"), "refused the request with status 301"),
        (lambda c: reply(c, "busy", "503 Busy"), "no answer .status 503"),
    ],
)
def test_answers_that_are_none(answer, said: str) -> None:
    with raw_server(answer) as url, pytest.raises(UserError, match=said):
        client(url).score(REQUEST)


def test_a_server_without_health_is_one_that_says_nothing_of_itself() -> None:
    with raw_server(lambda c: reply(c, "{}", "404 Not Found")) as url:
        assert client(url).health() == {}


def test_a_client_that_hangs_up_does_not_disturb_the_server(capfd) -> None:
    with serving(lambda questions: [0.0] * len(questions)) as server:
        for beginning in (b"", b"POST /score HTTP/1.1\r\nContent-Length: 50\r\n\r\n{", b"\x16\x03\x01\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                connection.sendall(beginning)
        assert client(server.url).score(REQUEST) == [0.0, 0.0]
    assert "Traceback" not in capfd.readouterr().err
