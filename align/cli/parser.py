"""The parser of the command line: commands grouped by task in the help, examples, and the nearest name for a typo."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

from align.cli.terminal import color

GROUPS: dict[str, tuple[str, ...]] = {
    "write a recipe": ("init", "import-recipe", "recipes", "show", "check", "plan"),
    "look at data": ("data",),
    "run": ("run", "sweep", "watch", "report"),
    "evaluate": ("eval", "compare"),
    "use a model": ("chat", "serve", "serve-rollout", "serve-reward"),
    "change a model": ("adapter", "convert", "show-model"),
    "this machine": ("doctor", "smoke", "completion"),
}
"""The commands by task, in the order of `align --help`."""
SYNONYMS = {"train": "run", "finetune": "run", "validate": "check", "lint": "check", "estimate": "plan", "new": "init"}
"""{command of another tool: command of align}."""
EXIT_STATUS = {
    0: "success",
    1: "a check failed (`smoke` has a wrong result, `doctor` a problem), or an unexpected exception with its traceback",
    2: "wrong input: a message on standard error names the place, the problem and the fix",
    130: "stopped by Ctrl-C (128 + 2); `align run` has written a checkpoint, and `--resume` continues",
    141: "the reader of the output, such as `head`, has closed the pipe",
    143: "stopped by SIGTERM (128 + 15), like Ctrl-C",
}
"""{exit status: meaning}. If a signal kills a rank, `align run` ends with status 2 and a message."""
EXAMPLES = "examples:\n"


def examples(*lines: str) -> str:
    """The examples of a command, as the epilog of its help."""
    return EXAMPLES + "\n".join(f"  {line}" for line in lines)


def examples_of(parser: argparse.ArgumentParser) -> list[str]:
    """The command lines in the epilog of a parser."""
    epilog = parser.epilog or ""
    return [line.strip() for line in epilog.removeprefix(EXAMPLES).splitlines()] if epilog.startswith(EXAMPLES) else []


class HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions, and keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Parser with one-sentence errors that name the nearest command, option or choice."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)
        self.set_defaults(parser=self)  # of the innermost command that was parsed

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else f". See `{self.prog} --help`."
        self.exit(2, f"{color('error:', 31)} {self.prog}: {message}{end}\n")

    def refuse(self, word: str) -> NoReturn:
        """Exit with the error for a word that is not an argument of this command."""
        if not word.startswith("-"):
            self.error(f"'{word}' is one argument too many")
        known = [name for action in self._actions if action.help != argparse.SUPPRESS for name in action.option_strings]
        near = get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.6)
        self.error(f"'{word}' is not an option" + (f". Did you mean '{near[0]}'?" if near else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"'{value}' is not a command{self._nearest_command(str(value))}")
        names = [str(choice) for choice in action.choices]
        near = get_close_matches(str(value), names, n=1, cutoff=0.6)
        where = action.option_strings[-1] if action.option_strings else action.dest
        hint = f"Did you mean '{near[0]}'?" if near else f"Use one of {', '.join(names)}."
        self.error(f"{where} {value}: not a valid value. {hint}")

    def _nearest_command(self, word: str) -> str:
        names = {command.prog.removeprefix(f"{self.prog} "): command for command in subcommands(self)}
        last = {name.split()[-1]: name for name in names}  # `align merge` means `align adapter merge`
        near = SYNONYMS.get(word)
        near = near if near in names else last.get(word)
        near = near or next(iter(get_close_matches(word, names, n=1, cutoff=0.6)), None)
        near = near or next((last[name] for name in get_close_matches(word, last, n=1, cutoff=0.7)), None)
        return f". Did you mean `{self.prog} {near}`?" if near else ""


class MainParser(Parser):
    """The parser of `align`, whose help groups the commands by task."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        summaries = {action.dest: action for action in _command_action(self)._get_subactions()}
        grouped = {name for names in GROUPS.values() for name in names}
        others = tuple(name for name in summaries if name not in grouped)
        for title, names in [*GROUPS.items(), ("other commands", others)]:
            formatter.start_section(title)
            formatter.add_arguments([summaries[name] for name in names if name in summaries])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([action for action in self._actions if action.option_strings])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers below `parser`, each before its own subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from subcommands(command)


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The commands below `parser` that have no subcommands."""
    return [command for command in subcommands(parser) if not any(subcommands(command))]


def _command_action(parser: argparse.ArgumentParser) -> argparse._SubParsersAction:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `recipe` and `overrides`."""
    parser.add_argument(
        "recipe", help="a YAML file, or the name of a shipped recipe (tiny, quickstart, ...; see `align recipes`)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.subkey=value",
        help="overrides of the recipe, e.g. stages.dpo.beta=0.2",
    )


def add_json(parser: argparse.ArgumentParser, words: str = "print the result as JSON") -> None:
    """Add `--json`, for commands whose result a script reads."""
    parser.add_argument("--json", action="store_true", help=words)


def add_verbosity(parser: argparse.ArgumentParser, quiet: str) -> None:
    """Add `--quiet` and `--verbose`. quiet: help text of `--quiet`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", "-q", action="store_true", help=quiet)
    group.add_argument(
        "--verbose", "-v", action="store_true", help="also show the warnings and progress bars of libraries"
    )
