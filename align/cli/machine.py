"""Commands on the machine itself: `doctor`, `smoke`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from align.cli.parser import add_json, examples
from align.cli.terminal import color


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    doctor = commands.add_parser(
        "doctor",
        help="show installed packages and GPUs, and whether they work together",
        description="Show versions, missing packages with the command that installs each, the GPUs with their driver, "
        "links and CUDA version, and whether this installation runs on them. The exit status is 1 if there is a "
        "problem.",
        epilog=examples("align doctor", "align doctor --json"),
    )
    add_json(doctor)
    doctor.set_defaults(command=_doctor)

    smoke = commands.add_parser(
        "smoke",
        help="run each part briefly on this machine and compare results and speed with expected values",
        description="Run each part of align once and print measured and expected values. This takes "
        "about fifteen minutes on a GPU and under three on two CPU cores. The exit status is 1 if a check has the "
        "verdict WRONG; the verdict 'slow' does not change it.",
        epilog=examples("align smoke", "align smoke --only 0 1 --folder /tmp/smoke"),
    )
    smoke.add_argument("--only", type=int, nargs="+", default=[], metavar="N", help="run only these parts (0 to 8)")
    smoke.add_argument(
        "--folder", type=Path, default=Path("runs/smoke"), help="folder for logs and runs (default: runs/smoke)"
    )
    smoke.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON with results, versions and hardware (default: smoke.json in the folder)",
    )
    add_json(smoke, "print the JSON; the table goes to standard error")
    smoke.set_defaults(command=_smoke)


def _doctor(options: argparse.Namespace) -> None:
    from align.doctor import examine

    findings = examine()
    if options.json:
        print(json.dumps(findings, indent=2))
    else:
        _print_findings(findings)
    if findings["problems"]:
        sys.exit(1)


def _print_findings(findings: dict[str, Any]) -> None:
    width = max(len(name) for name in findings["packages"])
    for name, package in findings["packages"].items():
        state = package["version"] or color(f"missing: {package['install']}", 33)
        print(f"  {name:<{width}}  {state}")
    print()
    for name, value in (findings["uses"] | findings["report"]).items():
        print(f"  {name:<{width}}  {value}")
    print()
    for kind, code in (("problems", 31), ("warnings", 33)):
        for sentence in findings[kind]:
            print(f"  {color(kind.removesuffix('s'), code)}: {sentence}")
    print(f"  {findings['verdict']}")


def _smoke(options: argparse.Namespace) -> None:
    from align.smoke.command import smoke
    from align.smoke.table import Verdict

    codes: dict[Verdict, int] = {"ok": 32, "slow": 33, "WRONG": 31, "skipped": 36}
    colored = sys.stdout.isatty() and not options.json
    paint = {verdict: color(verdict, code) for verdict, code in codes.items()} if colored else None

    def say(text: str) -> None:
        print(text, flush=True, file=sys.stderr if options.json else sys.stdout)

    output = options.output or options.folder / "smoke.json"
    verdict = smoke(options.folder, only=options.only, output=output, say=say, paint=paint)
    if options.json:
        print(output.read_text(encoding="utf-8"))
    if verdict == "WRONG":
        sys.exit(1)
