"""Prove the loss masks: `python -m tests.masks [TEMPLATE ...]` prints one line of JSON per chat template."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict

from tests.masks.proof import TEMPLATES, Report, prove


def _line(report: Report) -> str:
    return json.dumps({**asdict(report), "refused": dict(report.refused)}, ensure_ascii=False)


def _row(report: Report) -> str:
    trained = report.conversations - sum(report.refused.values())
    compared = [report.trl, report.trl_history, report.trl_no_end]
    cells = [f"`{report.template}`", trained, report.turns, report.split, report.escaped, report.by_tokens]
    cells += compared if any(compared) else ["–"] * 3
    return f"| {' | '.join(map(str, [*cells, len(report.wrong)]))} |"


def main() -> int:
    """Print the reports; 1 if a mask is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.masks", description=__doc__)
    parser.add_argument("templates", nargs="*", metavar="TEMPLATE", help=f"default: all of {', '.join(TEMPLATES)}")
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print rows of a Markdown table instead")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    wrong = 0
    for name in options.templates or TEMPLATES:
        report = prove(name, options.conversations, options.seed)
        wrong += len(report.wrong)
        print(_row(report) if options.table else _line(report), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
