"""Commands on data: `data show`, `data stats`, `data convert`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.cli.parser import add_json, examples
from align.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    data = commands.add_parser(
        "data", help="show a stage's data, convert files", description="Show a stage's data, or convert files."
    )
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    show = kinds.add_parser(
        "show",
        help="print rows as the model sees them",
        description="Print the rows that a stage would train on: a report, and the first rows with the tokens in the "
        "loss marked. Rows are tokenised as in a run, into the same cache.",
        epilog=examples(
            "align data show tiny sft",
            "align data show my.yaml dpo --row 12 --ids",
            "align data show my.yaml sft stages.sft.data.max_length=512",
        ),
    )
    show.add_argument("--rows", type=int, default=3, metavar="N", help="number of rows to print (default: 3)")
    show.add_argument("--row", type=int, metavar="I", help="print row I, counted from 0 in the order of training")
    show.add_argument("--ids", action="store_true", help="also print the token ids")
    stats = kinds.add_parser(
        "stats",
        help="count a stage's rows and tokens",
        description="Print the report of `align data show` without rows.",
        epilog=examples("align data stats my.yaml sft", "align data stats my.yaml sft --json"),
    )
    stats.set_defaults(rows=0, row=None, ids=False)
    for command in (show, stats):
        command.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
        command.add_argument("stage", help="the stage whose data to print")
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="key.subkey=value", help="overrides of the recipe"
        )
        command.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/<name>)")
        add_json(command)
        command.set_defaults(command=_show)
    convert = kinds.add_parser(
        "convert",
        help="write rows of any shape as JSON Lines in canonical form",
        description="Write the rows of a file, a folder or a glob pattern as JSON Lines in canonical form. Rows that "
        "cannot be used are dropped and counted by reason. docs/data.md shows every shape and its canonical form.",
        epilog=examples(
            "align data convert chats.parquet chats.jsonl",
            "align data convert qa.csv qa.jsonl --columns prompt=question completion=answer",
        ),
    )
    convert.add_argument("source", metavar="IN", help="a data file, a folder or a glob pattern")
    convert.add_argument("target", metavar="OUT", type=Path, help="the .jsonl file to write")
    convert.add_argument("--split", nargs="+", default=[], help="splits to read, if the folder has several")
    convert.add_argument("--name", help="configuration to read, if the README.md of the folder lists several")
    convert.add_argument("--format", help="shape of the rows, if they have the columns of several")
    convert.add_argument(
        "--columns", nargs="+", default=[], metavar="NEW=OLD", help="column names: standard name = name in the file"
    )
    convert.add_argument(
        "--roles", nargs="+", default=[], metavar="NAME=ROLE", help="roles: name in the file = system, user, ..."
    )
    convert.add_argument("--ignore", nargs="+", default=[], metavar="COLUMN", help="columns to ignore")
    add_json(convert, "print the counts as JSON")
    convert.set_defaults(command=_convert)


def _show(options: argparse.Namespace) -> None:
    for option in ("rows", "row"):
        if (getattr(options, option) or 0) < 0:
            raise UserError(f"--{option} {getattr(options, option)}: must not be negative. Correct the option.")
    from align.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from align.cli.data_text import print_preview
    from align.cli.terminal import progress
    from align.recipes.duration import estimate_time
    from align.recipes.preview import preview

    start, count = (0, options.rows) if options.row is None else (options.row, 1)
    run_dir = options.run_dir or Path("runs") / recipe.name
    with redirect_stdout(sys.stderr):  # keep the output of libraries apart
        found = preview(recipe, options.stage, run_dir, progress)
        rows = found.rows(start, count) if count else []
        time = estimate_time(recipe, options.stage, run_dir, found)
    if options.json:
        shown = [{side.name: side.to_dict() for side in row} if len(row) > 1 else row[0].to_dict() for row in rows]
        report = {**found.to_dict(), "time": asdict(time)}
        print(json.dumps({"rows": shown, "report": report}, ensure_ascii=False, indent=1))
        return
    print_preview(found, time, rows, start, ids=options.ids)


def _convert(options: argparse.Namespace) -> None:
    from align.data.convert import convert

    if options.target.suffix != ".jsonl":
        raise UserError(f"{options.target}: the name does not end in .jsonl. Pass another name.")
    if options.target.exists():
        raise UserError(f"{options.target}: exists already. Pass another name, or remove the file.")
    if not options.target.parent.is_dir():
        raise UserError(f"{options.target.parent}: the folder does not exist. Create it.")
    counts = convert(_source(options), options.target)
    print(json.dumps(vars(counts), ensure_ascii=False, indent=2) if options.json else counts.summary())


def _source(options: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from align.config.parts import FileSource

    values = {
        "path": options.source,
        "split": options.split or None,
        "name": options.name,
        "format": options.format,
        "columns": pairs("--columns", options.columns),
        "roles": pairs("--roles", options.roles),
        "ignore": options.ignore,
    }
    try:
        return FileSource.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = "--" + str(first["loc"][0]) if first["loc"] else "align data convert"
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}. Correct the option.") from None


def pairs(option: str, values: list[str]) -> dict[str, str]:
    """The words NEW=OLD of an option, as {NEW: OLD}."""
    parts = [value.partition("=") for value in values]
    for value, (new, equals, old) in zip(values, parts):
        if not (new and equals and old):
            raise UserError(f"{option} {value}: not of the form NAME=NAME. Correct the option.")
    return {new: old for new, _, old in parts}
