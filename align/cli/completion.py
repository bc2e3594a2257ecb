"""Completion of commands, options, recipes, stages and settings in bash, zsh and fish, by argcomplete.

At each Tab, the shell calls `align` with the command line in its environment, and reads the candidates from it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

from align.cli.parser import examples, leaves
from align.errors import UserError

ASKED = "_ARGCOMPLETE"
"""Environment variable that the shell sets to request candidates."""
SHELLS = ("bash", "zsh", "fish")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "completion",
        help="print the script that completes commands in your shell",
        description="Print a script for bash, zsh or fish that completes commands, options, recipes, stages and the "
        "settings of a recipe with Tab.",
        epilog=examples(
            "align completion bash > ~/.local/share/bash-completion/completions/align",
            "align completion zsh > ~/.zfunc/_align     # a folder in fpath",
            "align completion fish > ~/.config/fish/completions/align.fish",
        ),
    )
    command.add_argument("shell", choices=SHELLS, help="the shell")
    command.set_defaults(command=_completion)


def _completion(options: argparse.Namespace) -> None:
    from argcomplete import shellcode

    print(shellcode(["align"], shell=options.shell).strip())


def complete(parser: argparse.ArgumentParser, **how: Any) -> None:
    """Print the candidates and exit, if a shell has requested them. how: arguments of `argcomplete.autocomplete`."""
    if ASKED not in os.environ:
        return
    import argcomplete

    for command in leaves(parser):
        for action in command._actions:
            if action.choices is None and (candidates := CANDIDATES.get(action.dest)):
                setattr(action, "completer", candidates)  # noqa: B010  argcomplete reads the attribute
    argcomplete.autocomplete(parser, always_complete_options=False, **how)


def _recipes(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from align.config.load import SHIPPED

    return [*(path.stem for path in SHIPPED.glob("*.yaml")), *FilesCompleter(("yaml", "yml"))(prefix)]


def _stages(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    return list(_values(parsed_args).get("stages", {}))


def _settings(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """`key.subkey=` of every setting of the recipe, after the first letter. Earlier, they would hide the options."""
    return [f"{key}=" for key in _keys(_values(parsed_args), "")] if prefix else []


def _recipes_and_settings(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    return [*_recipes(prefix), *_settings(prefix, parsed_args)]


def _models(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import DirectoriesCompleter

    from align.config.presets import PRESETS

    return [*PRESETS, *DirectoriesCompleter()(prefix)]


def _values(parsed: argparse.Namespace) -> dict[str, Any]:
    """The recipe on the command line with its defaults; empty if there is none, or if it is not valid."""
    from align.config import load_recipe

    named = getattr(parsed, "recipe", None) or next(iter(getattr(parsed, "recipes", None) or []), None)
    try:
        return load_recipe(named).model_dump(mode="json") if named else {}
    except UserError:
        return {}


def _keys(values: dict[str, Any], path: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


CANDIDATES: dict[str, Callable[..., list[str]]] = {
    "recipe": _recipes,
    "recipes": _recipes_and_settings,
    "overrides": _settings,
    "stage": _stages,
    "only": _stages,
    "start": _stages,
    "model": _models,
}
"""{destination of an argument: function of its candidates}."""
