"""This version against an earlier one: the stages of the tiny recipe, PPO at bench_ppo.py's sizes, the MoE block.

`python benchmarks/bench_versions.py REVISION` checks the revision out into a temporary folder and runs both versions
alternately in this environment. `new / old` is the ratio of a pair of runs, median over the pairs: below 1 the new
version is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_ppo import CASES, prepare
from harness import write

ROOT = Path(__file__).parents[1]
BLOCK = """
import json
from bench_moe_block import SHAPES, blocks, steps
from harness import compare, medians
print(json.dumps({shape: medians(compare({"align": steps(blocks(sizes))["align"]}))["align"]
                  for shape, sizes in SHAPES.items()}))
"""
Seconds = dict[str, float]


def run_in(tree: Path, *arguments: str) -> tuple[str, Seconds]:
    """Run Python with the modules of `tree`; (standard output, {"CPU seconds": ...})."""
    path = os.pathsep.join(map(str, (tree, tree / "benchmarks")))
    before = os.times()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, {"CPU seconds": cpu}


def tiny(tree: Path, folder: Path) -> Seconds:
    """Seconds of each stage of the tiny recipe, and CPU seconds of the process."""
    _, seconds = run_in(tree, "-m", "align.cli", "run", "tiny", "--run-dir", str(folder / "run"))
    for file in sorted((folder / "run").glob("*/manifest.json")):
        seconds[file.parent.name] = json.loads(file.read_text(encoding="utf-8"))["seconds"]
    return seconds


def ppo(name: str) -> Callable[[Path, Path], Seconds]:
    def run(tree: Path, folder: Path) -> Seconds:
        """Seconds of all PPO iterations, and CPU seconds of the process."""
        case, result = folder / "case.json", folder / "result.json"
        settings = {"work_dir": str(folder), "threads": len(os.sched_getaffinity(0))}
        case.write_text(json.dumps({**prepare(CASES[name], folder), **settings}), encoding="utf-8")
        _, seconds = run_in(tree, str(tree / "benchmarks" / "bench_ppo.py"), "--align", str(case), str(result))
        return {**seconds, "rounds": json.loads(result.read_text())["seconds"]}

    return run


def block(tree: Path, folder: Path) -> Seconds:
    """Median seconds of a forward and backward pass of the MoE block, by shape."""
    output, _ = run_in(tree, "-c", BLOCK)
    found: Seconds = json.loads(output.splitlines()[-1])
    return found


PARTS: dict[str, Callable[[Path, Path], Seconds]] = {
    "block": block,
    "tiny": tiny,
    **{f"ppo, {name}": ppo(name) for name in CASES},
}


def compare_versions(part: str, old: Path, repeats: int) -> dict[str, Any]:
    trees = {"old": old, "new": ROOT}
    found: dict[str, list[Seconds]] = {"old": [], "new": []}
    for repeat in range(repeats):
        for side in ("old", "new") if repeat % 2 == 0 else ("new", "old"):
            with tempfile.TemporaryDirectory() as folder:
                found[side].append(PARTS[part](trees[side], Path(folder)))
            print(part, side, {name: round(value, 4) for name, value in found[side][-1].items()}, file=sys.stderr)
    return {
        name: {
            "new / old": round(
                statistics.median(b[name] / a[name] for a, b in zip(found["old"], found["new"], strict=True)), 3
            ),
            **{side: round(statistics.median(run[name] for run in runs), 4) for side, runs in found.items()},
        }
        for name in found["new"][0]
        if all(run.get(name) for runs in found.values() for run in runs)
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("revision")
    parser.add_argument("--parts", default=";".join(PARTS), help="some of: " + "; ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    revision = subprocess.run([*git, "rev-parse", options.revision], check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(old), revision.strip()], check=True)
        try:
            results = {
                part: compare_versions(part, old, options.repeats) for part in options.parts.split(";") if part in PARTS
            }
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(old)], check=True)
    write("versions", {"old": revision.strip(), "repeats": options.repeats, **results}, option=options.revision)


if __name__ == "__main__":
    main()
