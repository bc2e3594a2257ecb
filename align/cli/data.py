"""Commands on data files: `data convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    data = commands.add_parser("data", help="convert data files", description="Convert data files.")
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    convert = kinds.add_parser(
        "convert",
        help="write rows of any shape as JSON Lines in canonical form",
        description="Write the rows of a file, a folder or a glob pattern as JSON Lines in canonical form. Rows that "
        "cannot be used are dropped and counted by reason. docs/data.md shows every shape and its canonical form.",
    )
    convert.add_argument("source", metavar="IN", help="a data file, a folder or a glob pattern")
    convert.add_argument("target", metavar="OUT", type=Path, help="the .jsonl file to write")
    convert.add_argument("--split", nargs="+", default=[], help="splits to read, if the folder has several")
    convert.add_argument("--format", help="shape of the rows, if they have the columns of several")
    convert.add_argument(
        "--columns", nargs="+", default=[], metavar="NEW=OLD", help="column names: standard name = name in the file"
    )
    convert.add_argument(
        "--roles", nargs="+", default=[], metavar="NAME=ROLE", help="roles: name in the file = system, user, ..."
    )
    convert.add_argument("--ignore", nargs="+", default=[], metavar="COLUMN", help="columns to leave out")
    convert.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> None:
    from align.data.convert import convert

    if options.target.suffix != ".jsonl":
        raise UserError(f"{options.target}: the name does not end in .jsonl. Give another name.")
    if options.target.exists():
        raise UserError(f"{options.target}: exists already. Give another name, or remove the file.")
    if not options.target.parent.is_dir():
        raise UserError(f"{options.target.parent}: the folder does not exist. Create it.")
    print(convert(_source(options), options.target).summary())


def _source(options: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from align.config.parts import FileSource

    values = {
        "path": options.source,
        "split": options.split or None,
        "format": options.format,
        "columns": _pairs("--columns", options.columns),
        "roles": _pairs("--roles", options.roles),
        "ignore": options.ignore,
    }
    try:
        return FileSource.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = "--" + str(first["loc"][0]) if first["loc"] else "align data convert"
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}. Correct the option.") from None


def _pairs(option: str, values: list[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for value, (new, equals, old) in zip(values, pairs):
        if not (new and equals and old):
            raise UserError(f"{option} {value}: not of the form NAME=NAME. Correct the option.")
    return {new: old for new, _, old in pairs}
