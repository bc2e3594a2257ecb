"""The command `import-recipe`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from align.cli.parser import add_json, examples
from align.cli.terminal import color
from align.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "import-recipe",
        help="write a recipe from a LLaMA-Factory or axolotl file",
        description="Write a recipe from an SFT or DPO configuration of LLaMA-Factory or axolotl. Keys that cannot be "
        "mapped, or only with a difference, are printed with the reason and listed in comments of the recipe.",
        epilog=examples(
            "align import-recipe qwen3_lora_sft.yaml",
            "align import-recipe lora-8b.yml -o law.yaml --devices 8 --batch-size 128",
        ),
    )
    command.add_argument("file", type=Path, metavar="FILE", help="YAML file of LLaMA-Factory or axolotl")
    command.add_argument("-o", "--out", type=Path, metavar="OUT", help="the file to write (default: FILE-align.yaml)")
    command.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="number of processes the file was used with (default: 1)",
    )
    command.add_argument(
        "--batch-size", type=int, metavar="N", help="rows per optimizer step, for files that pack rows before batching"
    )
    add_json(command, "print the mapping of every key as JSON")
    command.set_defaults(command=_import)


def _import(options: argparse.Namespace) -> None:
    from align.draft.foreign.common import Importing
    from align.draft.foreign.read import import_recipe

    for flag, number in (("--devices", options.devices), ("--batch-size", options.batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: must be at least 1.")
    out = options.out or Path(f"{options.file.stem}-align.yaml")
    found = import_recipe(options.file, out, Importing(options.devices, options.batch_size))
    keys = found.keys
    if options.json:
        lists = ("mapped", "differs", "defaults", "ignored", "not_mapped")
        values = {"recipe": str(out), "from": found.tool, **{name: getattr(keys, name) for name in lists}}
        print(json.dumps({**values, "missing": found.missing}, indent=2))
        return
    print(
        f"{out}: from {found.tool}: {len(keys.mapped)} keys mapped, {len(keys.differs)} of them with a difference, "
        f"{len(keys.ignored)} without effect on the weights, {len(keys.not_mapped)} not mapped"
    )
    for title, code, entries in (("not mapped", 31, keys.not_mapped), ("differs", 33, keys.differs)):
        for key, reason in entries.items():
            print(f"  {color(title, code)}: {key}: {reason}")
    for key, words in keys.defaults.items():
        print(f"  not in the file: {key}: {words}")
    for problem in found.missing:
        print(f"  {color('missing here', 33)}: {problem}")
