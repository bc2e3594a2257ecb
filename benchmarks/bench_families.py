"""Every adopted family at a tiny size against transformers' own class: the table of docs/families.md.

    python benchmarks/bench_families.py              all families, about an hour of one core
    python benchmarks/bench_families.py qwen3_moe    some; the results of the others are kept
    python benchmarks/bench_families.py --server     the columns of rollout servers alone, a minute each
    python benchmarks/bench_families.py --chain      every stage from SFT to evaluation instead, a minute each

A call without names goes on with the families that have no complete results of this commit. It fails if a family has
neither a number nor a reason in some column.

Largest differences in float32 (random weights, three layers, hidden size 64; other weights differ by 1 to 4 nats):
the checks of `python -m tests.families`; losses and weights after three steps on two ranks with sharded experts
(mixtures of experts); log-probabilities of vLLM in the trainer's process and of a rollout server, at the start and
after each of three updates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import RESULTS, write

from align.run.manifest import code_version

ROOT = Path(__file__).parents[1]
WORKERS = 2
"""Families that are measured at the same time, each in its own processes."""
sys.path.insert(0, str(ROOT))

from tests.families.__main__ import CHECKS, OF_ROUTERS  # noqa: E402
from tests.families.engine import in_own_process  # noqa: E402
from tests.tiny_families import FAMILIES  # noqa: E402
from tests.unit.parallel.started import run_ranks  # noqa: E402

ENGINE = ("fresh", "updated")
SERVER = ("server fresh", "server updated")
RANKS = ("sharded", "sharded lora")
DENSE = dict.fromkeys((*OF_ROUTERS, *RANKS))
"""Columns without a value for a family without experts."""


def checks(model_type: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.families", "--one", model_type]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        return dict.fromkeys(CHECKS, f"fails: {last_line(done.stderr)}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: f"fails: {value}" if isinstance(value, str) else value for name, value in found.items()}


def ranks(model_type: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_ranks("family_ranks.py", 2, Path(folder), model_type)
        except AssertionError as error:
            last = last_line(str(error)).removeprefix("[rank0]: ")
            refused = last.startswith("align.errors.UserError: ")
            reason = last.removeprefix("align.errors.UserError: ") if refused else f"fails: {last[:200]}"
            return dict.fromkeys(RANKS, reason)
        found = json.loads((Path(folder) / "rank-0.json").read_text())
    return {
        name: max(found[f"{model_type}, {case}"][part] for part in ("losses", "weights"))
        for name, case in zip(RANKS, ("full", "lora"), strict=True)
    }


def engine(model_type: str) -> dict[str, Any]:
    found = in_own_process(model_type)
    if "error" in found:
        return dict.fromkeys(ENGINE, f"fails: {found['error']}")
    return {"fresh": found["fresh"], "updated": max(found["updated"]), "other experts recorded": found["routing"]}


def server(model_type: str) -> dict[str, Any]:
    found = in_own_process(model_type, server=True)
    if "error" in found:
        return dict.fromkeys(SERVER, f"fails: {found['error']}")
    return {"server fresh": found["fresh"], "server updated": max(found["updated"])}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def measure(model_type: str) -> dict[str, Any]:
    results = {**checks(model_type), **engine(model_type), **server(model_type)}
    dense = all(results[name] is None for name in OF_ROUTERS)
    return results | (dict.fromkeys(RANKS) if dense else ranks(model_type))


def faults(results: dict[str, Any]) -> list[str]:
    """Columns that failed or have no value."""
    dense = results.keys() >= DENSE.keys() and all(results[name] is None for name in DENSE)
    found = []
    for name in (*CHECKS, *ENGINE, *SERVER, *RANKS):
        value = results.get(name)
        if (value is None and not (dense and name in DENSE)) or str(value).startswith("fails"):
            found.append(name)
    return found


def has_numbers(results: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(isinstance(results.get(name), float) for name in names)


def chain(model_type: str, tied: bool) -> dict[str, Any]:
    """Seconds of all stages and the largest difference of a log-probability between sampler and trainer."""
    from tests.families.chain import check_chain

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found: dict[str, Any] = check_chain(model_type, Path(folder), tie_word_embeddings=tied)
        except AssertionError as error:
            print(error, flush=True)
            found = {"fails": str(error).strip().splitlines()[-1][:200]}
    return {**found, "seconds": round(time.monotonic() - started)}


def run_chains(model_types: list[str]) -> None:
    """Run the chain of each family, and of Llama also with tied embeddings. Families with a result are left out."""
    file, version = RESULTS / "families_chain.json", code_version()
    found: dict[str, Any] = json.loads(file.read_text())["results"]["families"] if file.exists() else {}
    for model_type in model_types:
        own = bool(FAMILIES[model_type].get("tie_word_embeddings"))
        for tied in (False, True) if model_type == "llama" else (own,):
            name = f"{model_type}, tied" if tied else model_type
            if name not in found or "fails" in found[name]:
                found[name] = chain(model_type, tied) | {"commit": version["commit"]}
                print(name, found[name], flush=True)
                write("families_chain", {"families": found}, option="--chain", show=False, version=version)


def read() -> dict[str, Any]:
    file = RESULTS / "families.json"
    return json.loads(file.read_text())["results"]["families"] if file.exists() else {}


def run_servers(model_types: list[str]) -> None:
    """Add the columns of rollout servers to the results of these families."""
    version = code_version()
    for model_type in model_types:
        results = server(model_type)
        print(model_type, results, flush=True)
        found = read()
        found[model_type] |= results | {"server commit": version["commit"]}
        write("families", {"families": found}, show=False, version=version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="default: all")
    parser.add_argument("--chain", action="store_true", help="run every stage from SFT to evaluation instead")
    parser.add_argument("--server", action="store_true", help="measure the columns of rollout servers alone")
    options = parser.parse_args()
    if options.chain:
        run_chains(options.model_types or list(FAMILIES))
        return
    found, version = read(), code_version()
    if options.server:
        run_servers(options.model_types or [name for name in found if not has_numbers(found[name], SERVER)])
        return
    wanted = options.model_types or [
        name for name in FAMILIES if found.get(name, {}).get("commit") != version["commit"] or faults(found[name])
    ]
    with ThreadPoolExecutor(WORKERS) as pool:
        for model_type, results in zip(wanted, pool.map(measure, wanted), strict=True):
            found[model_type] = results | {"commit": version["commit"]}
            print(model_type, results, flush=True)
            ordered = {name: found[name] for name in FAMILIES if name in found}
            write("families", {"families": ordered}, show=False, version=version)
    failed = {name: columns for name in wanted if (columns := faults(found[name]))}
    if failed:
        sys.exit(f"without a number: {failed}")


if __name__ == "__main__":
    main()
