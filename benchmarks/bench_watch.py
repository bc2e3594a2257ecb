"""Cost of `align watch` for a run: CPU seconds of a training stage with and without a page that shows it.

Runs the stage `pretrain` of `tiny` in pairs, one run of each pair watched, in alternating order. `align watch` runs in
its own process. A client sends the page's requests as often as the page does: the state, then the curves, samples and
expert loads that have changed.

Measures the CPU seconds of the run's process (user and system; one thread, because waiting threads count too), and
those of the command after its start, as a share of the run's duration: its cost for a run that uses all cores.

    --pairs N     pairs of runs (default 6)
    --steps N     optimizer steps of a run (default 300)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
from harness import write

EVERY_S = 2.0
T95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262, 12: 2.201, 16: 2.131, 20: 2.093}
"""Two-sided 95 % quantile of Student's t for N pairs."""


def train(folder: Path, steps: int) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of the run."""
    command = [sys.executable, "-m", "align.cli", "run", "tiny", "--only", "pretrain", "--run-dir", str(folder)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"stages.pretrain.max_steps={steps}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run has failed: {errors.decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


class Watcher:
    """`align watch` of a folder and a client that asks as the page does; `cpu` has its CPU seconds after its start."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "align.cli", "watch", str(folder), "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        found = re.search(r"http://\S+/", self.process.stdout.readline())
        assert found is not None
        self.url, self.requests, self.cpu = found[0], 0, 0.0
        used = psutil.Process(self.process.pid).cpu_times()
        self._start_cpu = used.user + used.system
        self._ended = threading.Event()
        self._client = threading.Thread(target=self._ask, daemon=True)
        self._client.start()

    def _get(self, path: str, **parameters: str) -> Any:
        self.requests += 1
        with urllib.request.urlopen(f"{self.url}{path}?{urlencode(parameters)}") as response:
            return json.load(response)

    def _ask(self) -> None:
        versions: dict[tuple[str, str, str], int] = {}
        pause = EVERY_S
        while not self._ended.wait(pause):
            state = self._get("state")
            pause = 0.05 if state["more"] else max(EVERY_S, state["wait"])
            for run in state["runs"]:
                for stage in run["stages"]:
                    for part, version in stage["versions"].items():
                        key = (run["id"], stage["name"], part)
                        if version and versions.get(key) != version:
                            self._get(part, run=run["id"], stage=stage["name"])
                            versions[key] = version

    def close(self) -> None:
        self._ended.set()
        self._client.join()
        self.process.terminate()
        _, _, usage = os.wait4(self.process.pid, 0)
        self.cpu = usage.ru_utime + usage.ru_stime - self._start_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6, choices=sorted(T95))
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        train(Path(scratch) / "warm-up", 10)  # caches of the data and of compiled Python
        for number in range(options.pairs):
            seconds: dict[str, tuple[float, float]] = {}
            for name in ("alone", "watched") if number % 2 else ("watched", "alone"):
                folder = Path(scratch) / f"{name}-{number}"
                watcher = Watcher(folder) if name == "watched" else None
                seconds[name] = train(folder, options.steps)
                if watcher is not None:
                    watcher.close()
                    watching = {"requests": watcher.requests, "watcher_cpu_seconds": round(watcher.cpu, 2)}
            pairs.append(
                {f"{name}_cpu_seconds": round(found[0], 3) for name, found in seconds.items()}
                | {f"{name}_wall_seconds": round(found[1], 3) for name, found in seconds.items()}
                | watching
            )
            print(pairs[-1], flush=True)
    shares = [pair["watched_cpu_seconds"] / pair["alone_cpu_seconds"] - 1 for pair in pairs]
    middle = statistics.mean(shares)
    half = T95[len(shares)] * statistics.stdev(shares) / len(shares) ** 0.5
    taken = statistics.mean(pair["watcher_cpu_seconds"] / pair["watched_wall_seconds"] for pair in pairs)
    result = {
        "steps": options.steps,
        "seconds_between_requests": EVERY_S,
        "watcher_share": round(taken, 5),
        "extra_cpu_share": round(middle, 5),
        "extra_cpu_share_95": [round(middle - half, 5), round(middle + half, 5)],
        "extra_cpu_share_median": round(statistics.median(shares), 5),
        "pairs": pairs,
    }
    print(f"the run's CPU seconds: {100 * middle:+.2f} % [{100 * (middle - half):+.2f}, {100 * (middle + half):+.2f}]")
    print(f"CPU seconds of `align watch` per second of the run: {100 * taken:.2f} %")
    write("watch", result)


if __name__ == "__main__":
    main()
