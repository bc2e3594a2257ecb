"""Fill the tables of docs/cli.md, and write docs/commands.md, from the parser: `python docs/make_cli.py`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from align.cli import build_parser
from align.cli.parser import EXIT_STATUS, GROUPS, examples_of, leaves

PAGE = Path(__file__).parent / "cli.md"
OPTIONS = Path(__file__).parent / "commands.md"
INTRO = """# Every option of every command

`python docs/make_cli.py` writes this page from the parser. [cli.md](cli.md) has the commands by task, exit statuses,
and what scripts can rely on.
"""


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


def options_page() -> str:
    """docs/commands.md: usage, arguments and examples of each command."""
    return "\n".join([INTRO, *(section(command) for command in ordered(leaves(build_parser())))])


def ordered(commands: Iterator[argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """The commands in the order of `align --help`."""
    names = [name for group in GROUPS.values() for name in group]
    first = {name: place for place, name in enumerate(names)}
    return sorted(commands, key=lambda command: first.get(command.prog.split()[1], len(first)))


def section(command: argparse.ArgumentParser) -> str:
    actions = [action for action in command._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    lines = [f"## {command.prog}", "", cell(command.description or ""), ""]
    if actions:
        lines += ["| argument | meaning |", "|---|---|", *(row(action) for action in actions), ""]
    if found := examples_of(command):
        lines += ["```sh", *found, "```", ""]
    return "\n".join(lines)


def row(action: argparse.Action) -> str:
    """An argument as it is typed, with its choices, and what its help says."""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.option_strings:
        name = ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")
    else:
        name = {"*": f"[{value} ...]", "+": f"{value} [...]", "?": f"[{value}]"}.get(str(action.nargs), value)
    values = {**vars(action), "choices": ", ".join(map(str, action.choices or ()))}
    return f"| `{cell(name)}` | {cell((action.help or '') % values)} |"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    OPTIONS.write_text(options_page(), encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
