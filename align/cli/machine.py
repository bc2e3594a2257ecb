"""Commands on the machine itself: `doctor`."""

from __future__ import annotations

import argparse
import json

from align.cli.terminal import color


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    doctor = commands.add_parser(
        "doctor",
        help="show installed packages, the GPUs, and whether they fit together",
        description="Show versions, missing packages with the command that installs each, the GPUs with their driver, "
        "links and CUDA version, and whether this installation runs on them.",
    )
    doctor.add_argument("--json", action="store_true", help="print the result as JSON")
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    from align.doctor import examine

    findings = examine()
    if options.json:
        print(json.dumps(findings, indent=2))
        return
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
