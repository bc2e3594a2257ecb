"""Launchers of several machines connect, and a failure on one machine ends all of them. Threads stand for machines."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from align.errors import UserError
from align.launch import machines
from align.launch.machines import Failure, Follower, Leader, Line
from align.launch.processes import free_port

HOSTS = {"127.0.0.1": 2, "127.0.0.2": 1, "127.0.0.3": 1}
CAUSE = Failure(2, "rank 3 was ended by SIGKILL", cause=True)
CONSEQUENCE = Failure(1, None, log="Connection closed by peer", where="rank 0 failed")


def say(line: str) -> None:
    pass


class Connected:
    """Three connected launchers."""

    def __init__(self, hosts: dict[str, int] = HOSTS):
        self.port = free_port()
        names = list(hosts)
        self.leader = Leader(hosts, names[0], self.port)
        self.followers = [Follower(hosts, name, self.port) for name in names[1:]]
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(follower.gather, say) for follower in self.followers]
            assert self.leader.gather(say, 4711) == 4711
            assert [job.result(20) for job in jobs] == [4711] * len(jobs)

    def turn_until_over(self, own: dict[int, Failure], finished: tuple[bool, ...]) -> list[Failure | None]:
        """Exchange messages until the run is over; return the failure that each machine reports. Machine 0 leads."""

        def work(number: int) -> Failure | None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                over, failure = self.all[number].turn(own.get(number), finished[number])
                if over:
                    return failure
            raise AssertionError("the run did not end within 20 seconds")

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(work, range(len(self.all))))

    @property
    def all(self) -> list[Leader | Follower]:
        return [self.leader, *self.followers]

    def close(self) -> None:
        for machine in self.all:
            machine.close()


@pytest.fixture
def connected() -> Iterator[Connected]:
    connected = Connected()
    yield connected
    connected.close()


def test_a_run_is_over_when_all_machines_have_finished(connected: Connected) -> None:
    """A machine that has finished waits for the others."""
    for _ in range(5):
        assert connected.leader.turn(None, True) == (False, None)
    assert connected.turn_until_over({}, (True, True, True)) == [None] * 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_failure_on_one_machine_is_reported_on_all(connected: Connected, number: int) -> None:
    long = Failure(7, None, log="é" * machines.LOG_SENT, where="rank 1 on 127.0.0.2 failed")
    clock = time.monotonic()
    assert connected.turn_until_over({number: long}, (False, True, False)) == [long] * 3
    assert time.monotonic() - clock < 5


def test_a_cause_is_reported_before_its_consequences(connected: Connected) -> None:
    assert connected.turn_until_over({0: CONSEQUENCE, 1: CONSEQUENCE, 2: CAUSE}, (False,) * 3) == [CAUSE] * 3


def test_a_machine_whose_launcher_is_gone_ends_the_run(connected: Connected) -> None:
    connected.followers[1].close()
    connected.followers.pop()
    said = connected.turn_until_over({}, (False, False))
    assert said == [machines.ended("127.0.0.3")] * 2


def test_the_end_of_the_first_machine_ends_the_run(connected: Connected) -> None:
    connected.leader.close()
    for follower in connected.followers:
        while not (end := follower.turn(None, False))[0]:
            pass
        assert end[1] == machines.ended("127.0.0.1")


def test_a_machine_without_heartbeats_ends_the_run(connected: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "SILENCE", 2.0)
    # The second follower hangs with an open connection.
    monkeypatch.setattr(connected.followers[1], "turn", lambda own, finished: (True, None))
    clock = time.monotonic()
    said = connected.turn_until_over({}, (False,) * 3)
    assert 1.0 < time.monotonic() - clock < 8
    assert said[0] == said[1]
    assert said[0] is not None
    assert said[0].sentence is not None
    assert said[0].sentence.startswith("127.0.0.3 has not responded for 2 seconds")


def test_connections_that_do_not_belong_to_the_run_are_refused() -> None:
    connected = Connected()
    late, other = (
        Follower(HOSTS, "127.0.0.3", connected.port),
        Follower(HOSTS | {"127.0.0.3": 5}, "127.0.0.3", connected.port),
    )
    for follower, sentence in (
        (late, "127.0.0.1 has already started"),
        (other, "runs with another hostfile"),
    ):
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(follower.gather, say)
            deadline = time.monotonic() + 20
            while not job.done() and time.monotonic() < deadline:
                connected.leader.turn(None, False)
            if not job.done():
                connected.close()  # this ends the wait of the follower too
            with pytest.raises(UserError, match=re.escape(sentence)):
                job.result()
    with socket.create_connection(("127.0.0.1", connected.port)) as browser:
        browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
        for _ in range(3):
            assert connected.leader.turn(None, False) == (False, None)
    assert connected.turn_until_over({}, (True,) * 3) == [None] * 3
    connected.close()


def test_a_launcher_may_reconnect_before_the_start() -> None:
    hosts = {"127.0.0.1": 1, "127.0.0.2": 1, "127.0.0.3": 1}
    port = free_port()
    leader = Leader(hosts, "127.0.0.1", port)
    with ThreadPoolExecutor(3) as pool:
        start = pool.submit(leader.gather, say, 4711)
        with socket.create_connection(("127.0.0.1", port)) as first:
            line = Line(first)
            line.send(host="127.0.0.2", hosts=list(hosts.items()))
            assert json.loads(first.recv(100)) == {"welcome": "127.0.0.1"}
        followers = [Follower(hosts, name, port) for name in ("127.0.0.2", "127.0.0.3")]
        jobs = [pool.submit(follower.gather, say) for follower in followers]
        assert [start.result(20), *(job.result(20) for job in jobs)] == [4711] * 3
    for machine in (leader, *followers):
        machine.close()
