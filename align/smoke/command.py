"""Run the lines of `align smoke`, each in a separate process, print the table and write it as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from align import __version__
from align.errors import UserError, signal_name
from align.run.folder import write_json
from align.run.manifest import code_version, package_versions
from align.smoke.lines import LINES, Line
from align.smoke.table import Check, LineResult, Verdict, failed, rows, worst


def smoke(
    folder: Path,
    *,
    only: Sequence[int] = (),
    output: Path | None = None,
    say: Callable[[str], None] = print,
    paint: Mapping[Verdict, str] | None = None,
) -> Verdict:
    """Run the lines and return the worst verdict; a line that fails does not stop the others.

    folder: folder for logs, runs and the result of each line.
    only: numbers of the lines to run; default: all.
    output: file for the table with versions and hardware; default: smoke.json in `folder`.
    """
    chosen = [line for line in LINES if not only or line.number in only]
    if unknown := sorted(set(only) - {line.number for line in LINES}):
        raise UserError(f"--only {unknown[0]}: no such line; the lines are 0 to {LINES[-1].number}.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--folder {folder}: this is a file; pass a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for line in chosen:
        results.append(run_line(line, folder.resolve()))
        say("\n".join(rows(results[-1], paint)))
    verdict = worst([result.verdict for result in results])
    target = output or folder / "smoke.json"
    write_json(target, report(results, verdict))
    say(f"{sum(result.seconds for result in results):.0f} s; written to {target}")
    return verdict


def report(results: list[LineResult], verdict: Verdict) -> dict[str, Any]:
    """Content of the JSON file: versions, hardware, lines."""
    machines = [result.machine for result in results if result.machine]
    return {
        "align": __version__,
        "code": code_version(),
        "versions": package_versions(),
        "machine": machines[0] if machines else None,
        "verdict": verdict,
        "lines": [result.to_dict() for result in results],
    }


def run_line(line: Line, folder: Path) -> LineResult:
    """Run a line in a separate process, so that a crash does not stop the other lines and all memory is freed."""
    log, written = folder / f"line-{line.number}.log", folder / f"line-{line.number}.json"
    written.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    clock = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            line_command(line, folder), stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=line.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    machine, checks = read_result(written) if code == 0 else ({}, [failed(reason(code, line, log))])
    budget = line.budget(machine.get("device") == "cuda")
    return LineResult(line.number, line.title, checks, time.perf_counter() - clock, budget, str(log), machine)


def line_command(line: Line, folder: Path) -> list[str]:
    return [sys.executable, "-m", "align.smoke", str(line.number), str(folder)]


def read_result(path: Path) -> tuple[dict[str, Any], list[Check]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["machine"], [Check(**check) for check in content["checks"]]


def end_group(process: subprocess.Popen) -> None:
    """Kill the line's process and all processes in its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reason(code: int | None, line: Line, log: Path) -> str:
    """Reason for a missing result: the time limit, the signal that ended the line, or the last line of its log."""
    if code is None:
        return f"it did not end within {line.limit:.0f} s"
    if code < 0:
        return f"it was ended by {signal_name(-code)}"
    last = [text for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    return last[-1].strip()[:300] if last else f"it ended with exit code {code}"
