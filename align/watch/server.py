"""HTTP server of the live page: the page at /, and its data as JSON, which needs the token if there is one.

    GET /state?run=NAME...                            runs, stages, progress, versions of the parts
    GET /curves?run=NAME&stage=STAGE                  charts of a stage
    GET /samples?run=NAME&stage=STAGE                 its last samples
    GET /experts?run=NAME&stage=STAGE[&layer=N]       router load of each expert
    GET /comparison?run=NAME                          tables and samples of the evaluations

The page itself has no data, so a browser may load it without the token.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import re
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from align.launch.http_server import HttpServer, QuietHandler
from align.serve.settings import is_loopback
from align.watch.page import POLICY, live_page
from align.watch.runs import Run, Stage, Watched

SELECTED = 7
"""Number of runs that are selected initially, the newest ones; equals the number of colours."""
READING_S = 0.3
"""Seconds that one request may spend on reading files; the page requests the rest again."""
PACE = 100
"""Seconds between requests for the state per CPU second of this process, so that it takes about a hundredth of one core
from a run on the same machine."""
LONGEST_WAIT_S = 10
"""Upper bound of the wait, so that the page stays current. Above 0.1 CPU seconds per request the share is larger."""
COMPRESS_FROM = 2000
"""Responses of at least this many bytes are compressed."""


class NotFound(Exception):
    """The request names a run or stage that does not exist; the message names it."""


class Live:
    """The data of the page, read at each request. Requests of several clients are answered one after another."""

    def __init__(self, folder: Path):
        self.watched = Watched(folder)
        self._lock = threading.Lock()
        self._counted, self._paid_until = time.process_time(), time.monotonic()

    def respond(self, path: str, query: dict[str, list[str]]) -> dict[str, Any]:
        """The response to a request. query: parameters of the address."""
        with self._lock:
            if path == "/state":
                return self._state(query.get("run", []))
            if path == "/comparison":
                return self._run(query).comparison()
            stage = self._stage(query)
            if path == "/curves":
                return {"version": stage.versions["curves"], "charts": stage.charts()}
            if path == "/samples":
                return {"version": stage.versions["samples"], "samples": list(stage.samples)}
            layer = query.get("layer", [""])[0]
            load = stage.expert_load(int(layer) if layer.isdecimal() else None)
            return {"version": stage.versions["experts"], **load}

    def _state(self, wanted: list[str]) -> dict[str, Any]:
        changes, now = self.watched.scan(), time.time()
        selected = [name for name in wanted if name in changes] or list(changes)[:SELECTED]
        more = self.watched.read(selected, time.monotonic() + READING_S)
        runs = [
            {
                "id": name,
                "changed": max(now - changed, 0.0),
                **(self.watched.runs[name].state(now) if name in selected else {"name": name, "stages": None}),
            }
            for name, changed in sorted(changes.items(), key=lambda item: in_order(item[0]))
        ]
        return {"folder": str(self.watched.folder), "more": more, "wait": self._wait(more), "runs": runs}

    def _wait(self, more: bool) -> float:
        """Seconds that the page should wait before it asks again, 0 if it need not; see `PACE`.

        All clients share the pace. more: files are still being read for the first time, which is not slowed down.
        """
        counted, now = time.process_time(), time.monotonic()
        spent, self._counted = counted - self._counted, counted
        due = max(self._paid_until, now) + PACE * spent
        self._paid_until = now if more else min(due, now + LONGEST_WAIT_S)
        return round(self._paid_until - now, 2)

    def _run(self, query: dict[str, list[str]]) -> Run:
        name = query.get("run", [""])[0]
        if name not in self.watched.runs:
            raise NotFound(f"run: '{name}' is not being watched; GET /state?run={name} first.")
        return self.watched.runs[name]

    def _stage(self, query: dict[str, list[str]]) -> Stage:
        run, name = self._run(query), query.get("stage", [""])[0]
        if name not in run.stages:
            raise NotFound(f"stage: the run has no stage '{name}'; GET /state lists the stages.")
        return run.stages[name]


def in_order(name: str) -> list[tuple[float, str]]:
    """Sort key that orders numbers within names by value: run-2 before run-10."""
    parts = re.split(r"([0-9]+(?:[.][0-9]+)?)", name)
    return [(float(part), "") if place % 2 else (-1.0, part) for place, part in enumerate(parts)]


PARTS = ("/state", "/curves", "/samples", "/experts", "/comparison")


class WatchServer(HttpServer):
    """Serves the live page of a folder. Port 0 selects a free port.

    token: bearer token of every request for data. None requires none, which is allowed on loopback addresses only.
    """

    def __init__(self, folder: Path, host: str, port: int, token: str | None = None):
        self.live, self.host = Live(folder), host
        self.page = live_page().encode()
        self._digest = None if token is None else _digest(token)
        super().__init__(host, port, _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server_port}/"

    def admits(self, authorization: str) -> bool:
        """True if the header contains the server's token, or if the server requires none."""
        if self._digest is None:
            return True
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(_digest(token.strip()), self._digest)

    def knows(self, host: str) -> bool:
        """True if a request names this server as its host.

        Otherwise, on a server without a token, a web site whose name resolves to this machine could read the data by a
        script (DNS rebinding).
        """
        name = urlsplit(f"//{host}").hostname or ""
        return self._digest is not None or name == self.host or is_loopback(name)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class _Handler(QuietHandler):
    server: WatchServer

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if not self.server.knows(self.headers.get("Host", "")):
            self._json(403, {"error": "Host: the server has another name; open the address that `align watch` prints."})
        elif address.path == "/":
            self._send(200, self.server.page, "text/html; charset=utf-8")
        elif address.path not in PARTS:
            self._json(404, {"error": f"{address.path}: the server has no such page."})
        elif not self.server.admits(self.headers.get("Authorization", "")):
            self._json(401, {"error": "Authorization: the bearer token is missing or wrong; send the server's token."})
        else:
            try:
                self._json(200, self.server.live.respond(address.path, parse_qs(address.query)))
            except NotFound as problem:
                self._json(404, {"error": str(problem)})

    do_HEAD = do_GET

    def _json(self, status: int, value: dict[str, Any]) -> None:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        self._send(status, text.encode("utf-8", "replace"), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        if len(body) >= COMPRESS_FROM and "gzip" in self.headers.get("Accept-Encoding", "") and not self._is_local:
            body = gzip.compress(body, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _is_local(self) -> bool:
        """True for a client on this machine, where compression costs more time than it saves."""
        return is_loopback(self.client_address[0])
