"""Fill the tables of docs/cli.md from the parser: `python docs/make_cli.py`."""

from __future__ import annotations

import re
from pathlib import Path

from align.cli import build_parser
from align.cli.parser import EXIT_STATUS, GROUPS, leaves

PAGE = Path(__file__).parent / "cli.md"


def commands() -> str:
    """A row per command: what it does, and its options `--json`, `--quiet` and `--verbose`."""
    lines = ["| task | command | what it does | for scripts and logs |", "|---|---|---|---|"]
    found = leaves(build_parser())
    for task, names in GROUPS.items():
        for name in names:
            for command in found:
                words = command.prog.removeprefix("align ")
                if words.split()[0] == name:
                    known = command._option_string_actions
                    flags = " ".join(f"`{flag}`" for flag in ("--json", "--quiet", "--verbose") if flag in known)
                    summary = (command.description or "").partition(". ")[0].rstrip(".")
                    lines.append(f"| {task} | `align {words}` | {summary} | {flags or '–'} |")
                    task = ""
    return "\n".join(lines)


def exit_statuses() -> str:
    lines = ["| exit status | meaning |", "|---|---|"]
    return "\n".join([*lines, *(f"| {code} | {meaning} |" for code, meaning in EXIT_STATUS.items())])


TABLES = {"commands": commands, "exit statuses": exit_statuses}


def fill(page: str) -> str:
    """The page with its tables written anew."""
    for name, table in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page, count = block.subn(lambda match, table=table: f"{match[1]}{table()}{match[2]}", page)
        assert count == 1, name
    return page


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
