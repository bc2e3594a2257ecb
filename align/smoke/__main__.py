"""Run one line of `align smoke` and write its checks to a file: `python -m align.smoke NUMBER FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from align.run.folder import write_json
from align.run.manifest import hardware
from align.smoke.lines import LINES
from align.smoke.machine import find_machine


def main() -> None:
    number, folder = int(sys.argv[1]), Path(sys.argv[2])
    line = next(line for line in LINES if line.number == number)
    machine = find_machine()
    checks = line.run(machine, folder)
    facts = machine.to_dict() | {"hardware": hardware()}
    write_json(folder / f"line-{number}.json", {"machine": facts, "checks": [vars(check) for check in checks]})


if __name__ == "__main__":
    main()
