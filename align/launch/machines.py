"""Connect the launchers of several machines, so that a failure on one ends the run on all. Does not import torch.

The launcher on the hostfile's first machine is the leader. It listens on MASTER_PORT, waits for all other launchers and
sends them the port at which the ranks connect. Leader and launchers send each other a heartbeat each second. Launchers
report failures to the leader, which picks the one to show to the user and sends it to all launchers. Messages are
JSON, one per line.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from align.errors import UserError

MEETING = 15 * 60.0
"""Seconds that launchers wait for all other launchers, and ranks for all other ranks."""
SILENCE = 30.0
"""Seconds without a heartbeat after which a machine counts as lost."""
BEAT = 1.0
"""Seconds between two heartbeats."""
SETTLE = 1.0
"""Seconds that the leader collects failures before it picks one, because ranks that lose their connection to a failed
rank fail as well."""
ANSWER = 10.0
"""Seconds within which the peer of a new connection must send a message; otherwise it is taken for another program."""
LONGEST_LINE = 2**20
LOG_SENT = 50_000
"""Maximum number of characters of a failed rank's log that every machine prints, counted from the log's end."""


@dataclass(frozen=True)
class Failure:
    """The reason why a run ends.

    code      exit status
    sentence  message for the user; None: print `log` and `where`
    log       end of the failed rank's log
    where     line that names the failed rank and its log file
    cause     True if this failure cannot be the consequence of another rank's failure
    """

    code: int
    sentence: str | None
    log: str = ""
    where: str = ""
    cause: bool = False


class Others(Protocol):
    """The other machines of a run."""

    def turn(self, own: Failure | None, finished: bool) -> tuple[bool, Failure | None]:
        """Exchange messages for about 0.1 s; return (whether the run is over, its failure if any).

        own: this machine's failure, if any. finished: True if all ranks of this machine have succeeded.
        """

    def close(self) -> None: ...


class Alone:
    """A run on one machine."""

    def turn(self, own: Failure | None, finished: bool) -> tuple[bool, Failure | None]:
        if not (own or finished):
            time.sleep(0.1)
        return own is not None or finished, own

    def close(self) -> None:
        pass


class Line:
    """A connection that carries messages. Its methods raise an `OSError` if the connection is lost."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        connection.settimeout(5.0)  # applies to sending; receivers wait in select
        self.buffer = b""
        self.heard = self.spoke = time.monotonic()

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, **message: Any) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")
        self.spoke = time.monotonic()

    def beat(self) -> None:
        if time.monotonic() - self.spoke >= BEAT:
            self.send()

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived; raises `ValueError` if the peer sends anything else."""
        received = self.connection.recv(65536)
        if not received:
            raise ConnectionResetError("closed")
        self.heard = time.monotonic()
        *lines, self.buffer = (self.buffer + received).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if len(self.buffer) > LONGEST_LINE or not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages

    def silent(self, limit: float) -> bool:
        return time.monotonic() - self.heard > limit

    def close(self) -> None:
        self.connection.close()


def lost(host: str) -> Failure:
    return Failure(
        2,
        f"{host} has not responded for {SILENCE:.0f} seconds; check that machine and the network, then continue with "
        "--resume.",
        cause=True,
    )


def ended(host: str) -> Failure:
    return Failure(2, f"`align run` on {host} has ended; continue with --resume on all machines.", cause=True)


class Leader:
    """The launcher on the hostfile's first machine."""

    def __init__(self, hosts: dict[str, int], here: str, port: int):
        self.hosts, self.here, self.port = hosts, here, port
        self.lines: dict[str, Line] = {}
        self.strangers: list[Line] = []
        self.failures: list[Failure] = []
        self.first_failure = 0.0
        self.reported = self.begun = False
        self.finished: set[str] = set()
        try:
            self.server = socket.create_server(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used on this machine ({os.strerror(error.errno or 0)}); end the process that "
                "uses it, or set MASTER_PORT to another port on every machine."
            ) from None

    def gather(self, say: Callable[[str], None], meeting_port: int) -> int:
        """Wait for all machines and send them the ranks' port.

        Raises `UserError` if a machine is missing after `MEETING` seconds.
        """
        since, said = time.monotonic(), False
        while missing := [host for host in self.hosts if host not in (self.here, *self.lines)]:
            waited = time.monotonic() - since
            if waited > MEETING:
                raise UserError(
                    f"{', '.join(missing)}: no connection within {MEETING / 60:.0f} minutes; start the same "
                    f"`align run` on every machine, and check that it reaches {self.here}:{self.port}."
                )
            if waited > 3 and not said:
                said = True
                say(f"waiting for {', '.join(missing)}: start the same command there")
            self._listen()
            for host, line in list(self.lines.items()):
                try:
                    line.beat()
                except OSError:
                    self._part(host)
                if line.silent(SILENCE):
                    self._part(host)
        self.begun = True
        for host, line in list(self.lines.items()):
            try:
                line.send(meet=meeting_port)
            except OSError:
                self._part(host)
        return meeting_port

    def turn(self, own: Failure | None, finished: bool) -> tuple[bool, Failure | None]:
        self._listen()
        for host, line in list(self.lines.items()):
            if line.silent(SILENCE):
                self._fail(lost(host))
            try:
                line.beat()
            except OSError:
                self._part(host)
        if own is not None and not self.reported:
            self.reported = True
            self._fail(own)
        if self.failures and time.monotonic() - self.first_failure > SETTLE:
            # `min` keeps the order of arrival, in which a consequence comes after its cause.
            failure = min(self.failures, key=lambda failure: not failure.cause)
            self._send_all(failed=asdict(failure))
            return True, failure
        if finished and self.finished >= set(self.lines) and not self.failures:
            self._send_all(over=True)
            return True, None
        return False, None

    def close(self) -> None:
        for line in (*self.lines.values(), *self.strangers):
            line.close()
        self.server.close()

    def _fail(self, failure: Failure) -> None:
        if not self.failures:
            self.first_failure = time.monotonic()
        if failure not in self.failures:
            self.failures.append(failure)

    def _part(self, host: str) -> None:
        """Close the connection to a launcher.

        Before the ranks start, the launcher may reconnect. Later this is a failure, unless its ranks have finished.
        """
        self.lines.pop(host).close()
        if self.begun and host not in self.finished:
            self._fail(ended(host))

    def _send_all(self, **message: Any) -> None:
        for line in self.lines.values():
            with suppress(OSError):
                line.send(**message)

    def _listen(self) -> None:
        readers: list[Any] = [self.server, *self.strangers, *self.lines.values()]
        ready = set(map(id, select.select(readers, [], [], 0.1)[0]))
        if id(self.server) in ready:
            with suppress(OSError):
                self.strangers.append(Line(self.server.accept()[0]))
        for line in list(self.strangers):
            if id(line) in ready or line.silent(ANSWER):
                self._greet(line)
        for host, line in list(self.lines.items()):
            if id(line) not in ready:
                continue
            try:
                for message in line.receive():
                    self._hear(host, message)
            except (OSError, ValueError):
                self._part(host)

    def _hear(self, host: str, message: dict[str, Any]) -> None:
        if "failed" in message:
            self._fail(Failure(**message["failed"]))
        elif "finished" in message:
            self.finished.add(host)

    def _greet(self, line: Line) -> None:
        """Accept or refuse a new connection, depending on its first message."""
        try:
            messages = [] if line.silent(ANSWER) else line.receive()
            if not messages and not line.silent(ANSWER):
                return  # the first line is still incomplete
            self.strangers.remove(line)
            host = messages[0].get("host") if messages else None
            refusal = self._refusal(host, messages[0]) if messages else "no message"
            line.send(**({"refused": refusal} if refusal else {"welcome": self.here}))
        except (OSError, ValueError):
            if line in self.strangers:
                self.strangers.remove(line)
            refusal = "not a launcher"
        if refusal:
            line.close()
        else:
            if host in self.lines:
                self.lines.pop(host).close()
            self.lines[str(host)] = line

    def _refusal(self, host: Any, message: dict[str, Any]) -> str | None:
        if list(map(list, self.hosts.items())) != message.get("hosts"):
            return (
                f"{self.here} runs with another hostfile ({_listed(self.hosts)}); use the same on all machines, or set "
                "MASTER_PORT to another port on all of them."
            )
        if host not in self.hosts or host == self.here:
            return f"{self.here} does not wait for {host}; start `align run` once on every machine of the hostfile."
        if self.begun:
            return f"the run on {self.here} has already started; end it there, and start all machines again."
        return None


def _listed(hosts: dict[str, int]) -> str:
    return ", ".join(f"{host} slots={slots}" for host, slots in hosts.items())


class Follower:
    """The launcher on any machine but the first."""

    def __init__(self, hosts: dict[str, int], here: str, port: int):
        self.hosts, self.here, self.port = hosts, here, port
        self.leader = next(iter(hosts))
        self.line: Line | None = None
        self.welcome = self.reported = self.done = False

    def gather(self, say: Callable[[str], None]) -> int:
        """Wait for the leader and all other machines; returns the ranks' port."""
        since, said = time.monotonic(), False
        place = f"{self.leader}:{self.port}"
        while True:
            waited = time.monotonic() - since
            if waited > MEETING:
                raise UserError(
                    f"{self.leader}: no connection within {MEETING / 60:.0f} minutes; start the same `align run` on "
                    f"every machine, and check that this one reaches {place}."
                )
            if waited > 3 and self.line is None and not said:
                said = True
                say(f"waiting for {place}: start the same command there")
            if self.line is None:
                self._connect(min(ANSWER, MEETING - waited + 1))
            elif (port := self._await_start(place)) is not None:
                return port

    def turn(self, own: Failure | None, finished: bool) -> tuple[bool, Failure | None]:
        assert self.line is not None
        try:
            if own is not None and not self.reported:
                self.reported = True
                self.line.send(failed=asdict(own))
            if finished and not self.done:
                self.done = True
                self.line.send(finished=True)
            self.line.beat()
            for message in self._received():
                if "failed" in message:
                    return True, Failure(**message["failed"])
                if "over" in message:
                    return True, None
        except (OSError, ValueError):
            return True, own or ended(self.leader)
        return (True, own or lost(self.leader)) if self.line.silent(SILENCE) else (False, None)

    def close(self) -> None:
        if self.line is not None:
            self.line.close()

    def _connect(self, limit: float) -> None:
        try:
            self.line = Line(socket.create_connection((self.leader, self.port), timeout=limit))
            self.line.send(host=self.here, hosts=list(self.hosts.items()))
        except OSError:
            self.line = None
            time.sleep(0.5)

    def _received(self) -> list[dict[str, Any]]:
        assert self.line is not None
        return self.line.receive() if select.select([self.line], [], [], 0.1)[0] else []

    def _await_start(self, place: str) -> int | None:
        assert self.line is not None
        try:
            self.line.beat()
            for message in self._received():
                if "refused" in message:
                    raise UserError(str(message["refused"]))
                self.welcome = self.welcome or "welcome" in message
                if "meet" in message:
                    return int(message["meet"])
        except (OSError, ValueError):
            self._leave(place)
        else:
            if self.line.silent(SILENCE if self.welcome else ANSWER):
                self._leave(place)
        return None

    def _leave(self, place: str) -> None:
        """Close the connection. Raises `UserError` unless the peer was a leader, which may be started again."""
        self.close()
        self.line = None
        if not self.welcome:
            raise UserError(
                f"{place} is in use by a program other than `align run`; set MASTER_PORT to another port on every "
                "machine."
            )
        self.welcome = False
        time.sleep(0.5)
