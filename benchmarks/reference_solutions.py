"""Run a benchmark's reference solutions in the sandbox: all must pass. Prints the cost of a run with and without walls.

    python benchmarks/reference_solutions.py HumanEval.jsonl

The file has HumanEval's columns: task_id, prompt, entry_point, canonical_solution, test. Programs run one at a time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

from align.config.rewards import CodeReward
from align.reward.code import score_one
from align.reward.sandbox.sandbox import Limits, Sandbox, find_bubblewrap, walls

PROGRAMS = 50


def used_s() -> float:
    """Processor seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_solutions(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").strip("\n").split("\n")]
    reward, box = CodeReward(kind="code"), Sandbox()
    start, before = time.perf_counter(), used_s()
    failed = []
    for row in rows:
        found = score_one(reward, box, row["canonical_solution"], row)
        if found.score != 1.0:
            failed.append(f"{row['task_id']}: {found.reason}")
    wall, processor = time.perf_counter() - start, used_s() - before
    print(f"{len(rows) - len(failed)} of {len(rows)} solutions pass behind: {walls(box)}")
    print(f"{wall:.1f} s, per program {1000 * wall / len(rows):.0f} ms wall, {1000 * processor / len(rows):.0f} ms CPU")
    print(*failed, sep="\n", end="\n" if failed else "")


def time_empty_program() -> None:
    boxes = {"limits only": Sandbox(unsafe=True), "walls": Sandbox(Limits(), bubblewrap="")}
    if found := find_bubblewrap(boxes["walls"].python):
        boxes["walls inside bubblewrap"] = Sandbox(bubblewrap=found)
    for name, box in boxes.items():
        before = used_s()
        seconds = [box.run_program("").seconds for _ in range(PROGRAMS)]
        processor = 1000 * (used_s() - before) / PROGRAMS
        print(f"empty program, {name}: {1000 * statistics.median(seconds):.0f} ms wall, {processor:.0f} ms CPU")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    run_solutions(parser.parse_args().file)
    time_empty_program()
