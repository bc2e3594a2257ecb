"""Shared by the benchmarks: interleaved timing, peak memory, child processes, and the JSON of the results."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.run.manifest import code_version, hardware, package_versions

RESULTS = Path(__file__).parent / "results"


def compare(variants: dict[str, Callable[[], Any]], repetitions: int = 7) -> dict[str, list[float]]:
    """Seconds of each variant in each repetition, after one warm-up repetition; the order of the variants rotates."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, repetitions):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            variants[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, against: str) -> float:
    """Ratio of the seconds of `name` and `against` in the same repetition, median over the repetitions."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 6) for name, values in seconds.items()}


class PeakMemory:
    """Peak resident memory in a `with` block minus the resident memory at its start, in bytes (Linux)."""

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.start = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status("VmHWM") - self.start


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def in_new_process(*arguments: str) -> dict[str, Any]:
    """Run the calling script again with arguments; return the JSON of its last line."""
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def write(
    name: str,
    results: dict[str, Any],
    *,
    option: str = "",
    show: bool = True,
    version: Mapping[str, Any] | None = None,
) -> None:
    """Write benchmarks/results/NAME.json with versions and hardware, and print the results if `show` is set.

    option: arguments of the script for these results.
    version: result of `code_version` when the script started. Writing results makes the working tree dirty.
    """
    facts = {
        "benchmark": name,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {option}".rstrip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **(version or code_version()),
        "hardware": hardware(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or None,
        "packages": package_versions(),
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if show:
        print(json.dumps(results, indent=2))
