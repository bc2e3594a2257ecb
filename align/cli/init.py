"""The command `init`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from align.cli.data import pairs
from align.cli.parser import add_json, examples
from align.cli.terminal import color
from align.errors import UserError

if TYPE_CHECKING:
    from align.draft.data import DataLook
    from align.draft.machine import Machine

STAGES = ("pretrain", "sft", "reward_model", "dpo", "kto")
Answer = TypeVar("Answer")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    init = commands.add_parser(
        "init",
        help="write a recipe for your model and data",
        description="Look at your data and this machine, and write a commented recipe that `align check` accepts. "
        "Without --model or --data, it prompts for it and for every other choice that is not passed.",
        epilog=examples(
            "align init",
            "align init law.yaml --model models/base --data chats.jsonl",
            "align init --model models/base --data qa.csv --columns prompt=question completion=answer",
            "align init --model Qwen/Qwen3-8B --data chats.jsonl pairs.jsonl --stage sft dpo --gpus 8 --gpu h100",
        ),
    )
    init.add_argument("out", type=Path, nargs="?", help="the file to write (default: recipe.yaml)")
    init.add_argument("--model", metavar="MODEL", help="checkpoint folder, hub id, or smollm2-135m-instruct")
    init.add_argument("--data", nargs="+", metavar="FILE", help="data files, folders or glob patterns")
    init.add_argument(
        "--columns", nargs="+", default=[], metavar="NEW=OLD", help="column names: standard name = name in the files"
    )
    init.add_argument("--stage", nargs="+", choices=STAGES, help="stages to write (default: chosen from the rows)")
    init.add_argument("--gpus", type=int, metavar="N", help="GPUs to train on (default: those of this machine)")
    init.add_argument("--gpu", metavar="NAME", help="GPU model of another machine: a100, h100, h200, ...")
    init.add_argument("--max-length", type=int, metavar="N", help="maximum tokens per row (default: from the data)")
    how = init.add_mutually_exclusive_group()
    how.add_argument("--lora", dest="lora", action="store_true", default=None, help="train adapters")
    how.add_argument("--full", dest="lora", action="store_false", help="train all weights (default: if they fit)")
    add_json(init, "print the path, the stages and the commands that follow as JSON")
    init.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> None:
    from align.draft import recipe as drafting
    from align.draft.machine import look_at_model

    missing = [f"--{name}" for name in ("model", "data") if getattr(options, name) is None]
    asks = bool(missing) and sys.stdin.isatty() and sys.stdout.isatty()
    if missing and not asks:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"align init: {' and '.join(missing)} {are} missing, and standard input is not a terminal. Pass them."
        )
    if options.max_length is not None and options.max_length < 8:
        raise UserError(f"--max-length {options.max_length}: must be at least 8.")
    out = options.out or Path("recipe.yaml")
    drafting.refuse_existing(out)
    columns = pairs("--columns", options.columns)
    model = options.model or _ask("model (a checkpoint folder or a hub id)", "smollm2-135m-instruct", str)
    data = _looks(options.data, columns) if options.data else _ask_for_data(columns)
    default = _default_stages(data)
    if options.stage is None and asks:
        question = f"stages ({', '.join(STAGES)})"
        chosen = _ask(question, " ".join(default), lambda text: drafting.stages_for(data, _words(text)))
    else:
        chosen = drafting.stages_for(data, options.stage or default)
    machine = _machine(options, asks)
    look = look_at_model(model)
    lora = not drafting.trains_fully(look, machine) if options.lora is None else options.lora
    if options.lora is None and asks:
        lora = _ask("train adapters (LoRA) instead of all weights", "yes" if lora else "no", _yes)
    name = drafting.run_name(out.stem if options.out else f"{Path(data[0].path).stem}-{list(chosen)[-1]}")
    draft = drafting.Draft(name, model, look, chosen, machine, lora, options.max_length)
    recipe = drafting.write_recipe(out, drafting.text_of(draft))
    commands = drafting.next_commands(out, recipe)
    warning = drafting.too_small(draft)
    if options.json:
        values = {
            "recipe": str(out),
            "name": name,
            "stages": {stage: data.path for stage, data in chosen.items()},
            "lora": lora,
            "data": {look.path: {"shapes": look.shapes, "tokens": look.tokens} for look in data},
            "machine": machine.summary(),
            "warning": warning,
            "commands": [command for command, _ in commands],
        }
        print(json.dumps(values, indent=2))
        return
    for look_of_file in data:
        print(f"{color('data', 36)}: {look_of_file.path}: {look_of_file.summary()}")
    print(f"{color('machine', 36)}: {machine.summary()}")
    if warning:
        print(f"{color('warning', 33)}: {warning}")
    print(f"{out}: {' and '.join(chosen)} with {'LoRA' if lora else 'all weights'}. Next:\n")
    width = max(len(command) for command, _ in commands)
    print("\n".join(f"  {command:<{width}}  # {words}" for command, words in commands))


def _looks(paths: list[str], columns: dict[str, str]) -> list[DataLook]:
    from align.draft.data import look_at

    return [look_at(path, columns) for path in paths]


def _ask_for_data(columns: dict[str, str]) -> list[DataLook]:
    def read(text: str) -> list[DataLook]:
        if not text:
            raise UserError("enter a path.")
        return _looks(text.split(), columns)

    return _ask("data (a file, a folder or a pattern)", "", read)


def _default_stages(data: list[DataLook]) -> list[str]:
    from align.draft.data import DEFAULT_STAGE

    return list(dict.fromkeys(DEFAULT_STAGE[look.shape] for look in data))


def _words(text: str) -> list[str]:
    words = text.replace(",", " ").split()
    if unknown := [word for word in words if word not in STAGES]:
        raise UserError(f"'{unknown[0]}' is not a stage; use {', '.join(STAGES)}.")
    if not words:
        raise UserError("enter a stage.")
    return words


def _yes(text: str) -> bool:
    if text.lower() not in ("y", "yes", "n", "no"):
        raise UserError(f"'{text}' is neither yes nor no.")
    return text.lower() in ("y", "yes")


def _machine(options: argparse.Namespace, asks: bool) -> Machine:
    from dataclasses import replace

    from align.draft.machine import Machine, read_this_machine, without_gpus

    here = read_this_machine()
    if options.gpu is not None:
        from align.plan.speed import GPUS

        if options.gpu not in GPUS:
            raise UserError(f"--gpu {options.gpu}: unknown; use one of {', '.join(GPUS)}.")
        here = Machine(here.cores, options.gpus or 1, GPUS[options.gpu].memory_gb, options.gpu.upper(), True)
    gpus = options.gpus
    if gpus is None and asks and here.gpus:
        gpus = _ask("GPUs to train on", str(here.gpus), _count)
    if gpus is None or gpus == here.gpus:
        return here
    if gpus < 0:
        raise UserError(f"--gpus {gpus}: must be 0 or more.")
    if gpus and not here.gpus:
        raise UserError(f"--gpus {gpus}: this machine has none; pass the GPU model of the other machine with --gpu.")
    return replace(here, gpus=gpus) if gpus else without_gpus()


def _count(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"'{text}' is not a number.")
    return int(text)


def _ask(question: str, default: str, read: Callable[[str], Answer]) -> Answer:
    """Prompt until the input is valid. Empty input selects the default."""
    while True:
        try:
            text = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
        except EOFError:
            raise UserError("align init: the input has ended; pass --model and --data.") from None
        try:
            return read(text or default)
        except UserError as error:
            print(f"  {error}")
