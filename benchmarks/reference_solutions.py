"""Run a benchmark's reference solutions in the sandbox: all must pass. Writes the cost of a run.

    python benchmarks/reference_solutions.py HumanEval.jsonl

The file has HumanEval's columns: task_id, prompt, entry_point, canonical_solution, test. Programs run one at a time.
The result is benchmarks/results/reference_solutions.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from harness import write

from align.config.rewards import CodeReward
from align.reward.code import score_one
from align.reward.sandbox.sandbox import Limits, Sandbox, find_bubblewrap, layers

PROGRAMS = 50


def used_s() -> float:
    """Processor seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_solutions(path: Path) -> dict[str, Any]:
    """Number of programs and of those that pass, and milliseconds of one."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").strip("\n").split("\n")]
    reward, box = CodeReward(kind="code"), Sandbox()
    start, before = time.perf_counter(), used_s()
    failed = []
    for row in rows:
        found = score_one(reward, box, row["canonical_solution"], row)
        if found.score != 1.0:
            failed.append(f"{row['task_id']}: {found.reason}")
    wall, processor = time.perf_counter() - start, used_s() - before
    print(*failed, sep="\n", end="\n" if failed else "")
    milliseconds = {"wall": 1000 * wall / len(rows), "cpu": 1000 * processor / len(rows)}
    return {"walls": layers(box), "programs": len(rows), "passed": len(rows) - len(failed), **rounded(milliseconds)}


def rounded(milliseconds: dict[str, float]) -> dict[str, Any]:
    return {"milliseconds": {name: round(value, 1) for name, value in milliseconds.items()}}


def time_empty_program() -> dict[str, Any]:
    """Milliseconds of a program without a statement, by what is around it."""
    boxes = {"limits only": Sandbox(unsafe=True), "walls": Sandbox(Limits(), bubblewrap="")}
    if program := find_bubblewrap(boxes["walls"].python):
        boxes["walls inside bubblewrap"] = Sandbox(bubblewrap=program)
    found = {}
    for name, box in boxes.items():
        before = used_s()
        seconds = [box.run_program("").seconds for _ in range(PROGRAMS)]
        processor = 1000 * (used_s() - before) / PROGRAMS
        found[name] = rounded({"wall": 1000 * statistics.median(seconds), "cpu": processor})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    found = {"solutions": run_solutions(file), "empty program": time_empty_program()}
    write("reference_solutions", found, option=file.name)
