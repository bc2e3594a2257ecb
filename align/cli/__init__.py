"""Parse the command line and call the command. Every command checks its paths before it loads torch."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path

from align import __version__
from align.cli import (
    adapter,
    compare,
    completion,
    data,
    eval,
    import_recipe,
    init,
    machine,
    models,
    plan,
    recipes,
    runs,
    serve,
    sweep,
    watch,
)
from align.cli.parser import MainParser, Parser
from align.cli.runs import process_overrides, run_command
from align.cli.terminal import color, verbosity
from align.errors import UserError, signal_name
from align.launch.ending import STOPPED, end_process, has_joined
from align.run import interrupt


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `align`.

    Exits with one of `align.cli.parser.EXIT_STATUS`; returns for 0.
    """
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    code = 0
    try:
        _expand_paths(options)
        with verbosity(quiet=getattr(options, "quiet", False), verbose=getattr(options, "verbose", False)):
            options.command(options)
    except UserError as error:
        print(f"{color('error:', 31)} {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        code = 128 + getattr(error, "number", signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except Exception:
        if not (has_joined() or interrupt.requested()):
            raise
        traceback.print_exc()
        code = 1
    if code and interrupt.requested():  # a failure after a request to stop is a consequence of it
        code = 128 + interrupt.requested()
    if code in STOPPED:
        print(_stopped_line(options, code), file=sys.stderr)
    if has_joined():
        end_process(code)
    if code:
        sys.exit(code)


def _expand_paths(options: argparse.Namespace) -> None:
    """Expand a leading `~` in every path; the shell does not expand it in `--run-dir=~/runs` or in quotes."""
    from align.config.paths import local_path

    vars(options).update({name: local_path(path) for name, path in vars(options).items() if isinstance(path, Path)})


def _stopped_line(options: argparse.Namespace, code: int) -> str:
    line = f"stopped by {signal_name(code - 128)}"
    if options.command is eval.run_evaluation:
        return f"{line}; the answers so far are recorded: continue with --resume"
    if options.command is sweep.run_command:
        return f"{line}; continue with the same command and --resume"
    if options.command is not runs.run_recipe:
        return line
    again = argparse.Namespace(**{**vars(options), "start": None, "resume": True})
    words = run_command(again, [*options.overrides, *process_overrides(options, options.overrides)])
    return f"{line}; continue with `align {shlex.join(words)}`"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the arguments. Overrides may also follow `--flags`, where argparse does not accept them."""
    parser = build_parser()
    completion.complete(parser)
    options, rest = parser.parse_known_args(arguments)
    # `check` takes overrides in its list of recipes.
    takes = next((name for name in ("overrides", "recipes") if hasattr(options, name)), None)
    late = [word for word in rest if "=" in word and not word.startswith("-") and takes is not None]
    if unknown := [word for word in rest if word not in late]:
        options.parser.refuse(unknown[0])
    if late and takes is not None:
        setattr(options, takes, [*getattr(options, takes), *late])
    return options


def build_parser() -> MainParser:
    parser = MainParser(
        prog="align",
        usage="align COMMAND ...",
        description="Post-train causal language models, dense or mixtures of experts, from one recipe.",
        epilog="`align COMMAND --help` describes a command and has examples. docs/cli.md lists the exit statuses.",
    )
    parser.add_argument("--version", action="version", version=f"align {__version__}")
    commands = parser.add_subparsers(prog="align", required=True, metavar="COMMAND", parser_class=Parser)
    for group in (
        init,
        import_recipe,
        recipes,
        runs,
        sweep,
        watch,
        plan,
        data,
        models,
        adapter,
        eval,
        compare,
        serve,
        machine,
        completion,
    ):
        group.add(commands)
    return parser
