"""The rollout servers of a run, started by the run or listed in the recipe.

Their settings are checked against the recipe. Servers that the run has started are restarted when they die.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from align.config.rollout import Rollout
from align.errors import UserError
from align.launch.processes import free_port
from align.rollout.placement import place_servers, visible_gpus
from align.rollout.server import Server, ServerFailure
from align.rollout.started_server import StartedServer

MAX_STARTS = 4
"""Maximum number of starts of one server in a run. A server that dies more often is not restarted."""
POLL_SECONDS = 0.2


class ServerPool:
    """The servers of a recipe. dtype: name of the dtype that they must compute in."""

    def __init__(self, checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int):
        self.rollout, self.dtype = rollout, dtype
        self.servers: list[Server] = [Server(url) for url in rollout.servers]
        for place in place_servers(rollout, visible_gpus()) if rollout.start_servers else []:
            self.servers.append(
                StartedServer(checkpoint, rollout, dtype=dtype, seed=seed, port=free_port(), placement=place)
            )

    def start(self) -> None:
        """Start the servers of `rollout.start_servers`, without waiting for them."""
        for server in self.started():
            server.start()

    def in_use(self) -> list[Server]:
        """Servers that work and have the current weights."""
        return [server for server in self.servers if server.failure is None]

    def started(self) -> list[StartedServer]:
        return [server for server in self.servers if isinstance(server, StartedServer)]

    def connect(self, server: Server) -> bool:
        """Connect to a server, wake it and clear its failure; False if it is not healthy.

        The caller then sends it the current weights. Raises UserError if the server does not fit the recipe.
        """
        if not server.is_healthy():
            return False
        try:
            server.read_facts()
            server.wake(self.rollout.request_timeout_seconds)  # another trainer may have left it asleep
        except ServerFailure as failure:
            server.failure = str(failure)
            return False
        self._check_facts(server)
        server.failure = None
        server.connections += 1
        return True

    def wait(self, servers: Iterable[Server], *, restart: bool) -> None:
        """Wait until each failed server in `servers` is connected or has ended, or the start timeout has passed.

        restart: restart servers that were started here and die.
        """
        waiting = [server for server in servers if server.failure]
        deadline = time.monotonic() + self.rollout.start_timeout_seconds
        while waiting:
            waiting = [server for server in waiting if not self.connect(server)]
            if restart:
                self.restart()
            waiting = [server for server in waiting if not (isinstance(server, StartedServer) and server.has_ended())]
            if time.monotonic() > deadline:
                return
            if waiting:
                time.sleep(POLL_SECONDS)

    def restart(self) -> None:
        """Restart failed servers that have ended or are not healthy within the start timeout, up to MAX_STARTS
        starts."""
        for server in self.started():
            if server.failure and server.starts < MAX_STARTS:
                hangs = server.seconds_since_start() > self.rollout.start_timeout_seconds and not server.is_healthy()
                if server.has_ended() or hangs:
                    server.start()

    def failures(self, servers: Iterable[Server]) -> str:
        """Message with the address and failure of each server, without a final period."""
        reasons = []
        for server in servers:
            reason = server.failure or "it failed"
            if isinstance(server, StartedServer) and server.has_ended():
                reason = f"it exited: {server.last_log_line()}"
            reasons.append(f"{server.url} ({reason})")
        only = "" if len(reasons) == 1 else f"all {len(reasons)} rollout servers failed, "
        return f"no rollout server responds: {only}{', '.join(reasons)}"

    def no_server(self, servers: Iterable[Server]) -> UserError:
        """Error for a run without any working server, with the failure of each server and the fix."""
        servers = list(servers)
        started_here = all(isinstance(server, StartedServer) for server in servers)
        fix = "Fix the cause" if started_here else "Start the servers with `align serve-rollout`"
        return UserError(f"{self.failures(servers)}. {fix}, then run again with --resume.")

    def close(self) -> None:
        """Stop the servers that were started here; the others keep running."""
        for server in self.started():
            server.close()
        self.servers = []

    def _check_facts(self, server: Server) -> None:
        where = f"rollout server {server.url}"
        if int(server.facts["max_model_length"]) < self.rollout.max_model_length:
            raise UserError(
                f"{where}: its max_model_length {server.facts['max_model_length']} is less than "
                f"rollout.max_model_length {self.rollout.max_model_length}. Start it with --max-model-length "
                f"{self.rollout.max_model_length}."
            )
        if server.facts["dtype"] != self.dtype:
            raise UserError(
                f"{where}: it computes in {server.facts['dtype']}, but the recipe's dtype is {self.dtype}. Start it "
                f"with --dtype {self.dtype}."
            )
        if self.rollout.return_routing and server.facts["routing"] != "True":
            raise UserError(
                f"{where}: it returns no routed experts, which rollout.return_routing needs. Start it on a GPU with "
                "--return-routing, or set rollout.engine: vllm."
            )
