"""The command `compare`: runs, stages and evaluations side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from align.cli.parser import add_json, examples
from align.cli.terminal import width

PAGE = Path("comparison.html")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    compare = commands.add_parser(
        "compare",
        help="compare runs, stages or evaluations",
        description="Compare runs, stages of runs and evaluations: metrics with paired differences from the first one, "
        "curves on common charts, and the settings that differ.",
        epilog=examples(
            "align compare runs/beta-0.1 runs/beta-0.3",
            "align compare small=runs/a large=runs/b --out sizes.html",
            "align compare runs/a/dpo runs/a/ppo evaluation/other --json",
        ),
    )
    compare.add_argument(
        "sides",
        nargs="+",
        metavar="[NAME=]PATH",
        help="folder of a run, of a stage, of an evaluation or of one model in it; NAME replaces its name",
    )
    compare.add_argument(
        "--out", type=Path, metavar="FILE", help=f"page to write (default: {PAGE}; with --json: no page)"
    )
    add_json(compare, "print the comparison as JSON")
    compare.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> None:
    from align.eval.comparison.build import compare_sides
    from align.eval.comparison.curves import curve_groups
    from align.eval.comparison.sides import read_sides
    from align.eval.comparison.text import comparison_lines
    from align.run.folder import write_text

    sides = read_sides(options.sides)
    comparison = compare_sides(sides)
    out = options.out or (None if options.json else PAGE)
    if out is not None:
        from align.eval.comparison.page import render_comparison  # loads matplotlib

        write_text(out, render_comparison(comparison, curve_groups(sides)))
    if options.json:
        print(json.dumps(comparison, indent=2, ensure_ascii=False))
    else:
        print("\n".join([*comparison_lines(comparison, width()), str(out)]))
