"""Run the checks on all adopted families, each family in its own processes: `python -m tests.families`.

A line per family with the largest error of each check; all results go to a JSON file. A later call without names goes
on from there; families that are named, and those that failed, are checked again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from align.config.families import TABLE
from tests.tiny_families import FAMILIES

CHECKS = (
    "forward",
    "gradients",
    "bfloat16",
    "packing",
    "scorer",
    "replay",
    "weighting",
    "balance",
    "names",
    "export",
    "lora",
    "plan",
)
OF_ROUTERS = ("replay", "weighting", "balance")
"""Checks without a result for dense families."""
WITH_FOLDER = ("names", "export", "bfloat16")


def run_checks(model_type: str) -> dict[str, float | str | None]:
    """Result of every check, or the error's text."""
    from tests.families import checks, planned

    results: dict[str, float | str | None] = {}
    for name in CHECKS:
        check = planned.check_plan if name == "plan" else getattr(checks, f"check_{name}")
        try:
            if name in WITH_FOLDER:
                with tempfile.TemporaryDirectory() as folder:
                    results[name] = check(model_type, Path(folder))
            else:
                results[name] = check(model_type)
            if results[name] is None and name not in OF_ROUTERS:
                results[name] = "the check returned no number"
        except Exception as error:  # reported in the table
            results[name] = f"{type(error).__name__}: {error}"[:300]
    return results


def name_problem(model_type: str) -> str | None:
    """Reason why a family cannot be checked, if any."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        return f"transformers has no model_type '{model_type}'"
    if model_type not in TABLE:
        return f"'{model_type}' is not in align/config/families.py"
    return None if model_type in FAMILIES else f"'{model_type}' is not in tests/tiny_families.py"


def cell(value: float | str | None) -> str:
    if isinstance(value, str):
        return "FAILED"
    return "dense" if value is None else str(value) if isinstance(value, int) else f"{value:.0e}"


def run_chains(model_types: list[str]) -> int:
    from tests.families.chain import check_chain

    failed = False
    for model_type in model_types or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{model_type:18}", check_chain(model_type, Path(folder)), flush=True)
            except AssertionError as error:
                failed = True
                print(f"{model_type:18} FAILED: {error}", flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="default: all")
    parser.add_argument("--json", type=Path, default=Path("build/families.json"), help="file of the results")
    parser.add_argument("--chain", action="store_true", help="run every stage from SFT to evaluation instead")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if problem := next(filter(None, map(name_problem, options.model_types)), None):
        parser.error(problem)
    if options.one:
        print(json.dumps(run_checks(options.one)))
        return 0
    if options.chain:
        return run_chains(options.model_types)
    done = json.loads(options.json.read_text()) if options.json.exists() else {}
    failed = False
    print(f"{'family':18}" + "".join(f"{name:>11}" for name in CHECKS))
    for model_type in options.model_types or FAMILIES:
        # Results of an earlier version lack its newer checks.
        passed = not any(isinstance(done.get(model_type, {}).get(name, "not run"), str) for name in CHECKS)
        if options.model_types or not passed:
            started = time.monotonic()
            command = [sys.executable, "-m", "tests.families", "--one", model_type]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            crashed = dict.fromkeys(CHECKS, found.stderr[-300:])
            done[model_type] = crashed if found.returncode else json.loads(found.stdout.splitlines()[-1])
            done[model_type]["seconds"] = round(time.monotonic() - started, 1)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps(done, indent=1))
            partial.rename(options.json)
        results = {name: done[model_type][name] for name in CHECKS}
        print(f"{model_type:18}" + "".join(f"{cell(value):>11}" for value in results.values()), flush=True)
        for name, value in results.items():
            if isinstance(value, str):
                failed = True
                print(f"  {name}: {value}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
