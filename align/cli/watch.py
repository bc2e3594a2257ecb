"""The command `watch`: follow runs in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from align.cli.parser import examples
from align.cli.terminal import say
from align.errors import UserError
from align.serve import TOKEN_VARIABLE

PORT = 8200


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    watch = commands.add_parser(
        "watch",
        help="follow runs in a browser while they train",
        description="Serve a page with the stages, curves, samples, router load, speed and memory of a run, or of all "
        "runs in a folder, until Ctrl-C. The folder is only read, and need not exist yet. Runs are not affected.",
        epilog=examples("align watch runs/tiny", "align watch runs --host 0.0.0.0 --token-file token.txt"),
    )
    watch.add_argument("folder", metavar="RUN|FOLDER", type=Path, help="a run's folder, or a folder of runs")
    watch.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback needs a token")
    watch.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0 picks a free port")
    watch.add_argument("--token", help="token that the page prompts for; other users of this machine can see it")
    watch.add_argument("--token-file", type=Path, help=f"file with the token (default: ${TOKEN_VARIABLE})")
    watch.set_defaults(command=_watch)


def _watch(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: it is a file; pass the folder of a run, or a folder of runs.")
    if (folder / "config.json").is_file() and (folder.resolve().parent / "recipe.json").is_file():
        raise UserError(f"{folder}: it is the folder of a stage; pass its run, {folder.resolve().parent}.")
    from align.serve.settings import resolved_token

    token = resolved_token(options.token, options.token_file, options.host)
    from align.watch.server import WatchServer

    with WatchServer(folder, options.host, options.port, token) as server:
        asks = "; the page prompts for the token" if token is not None else ""
        missing = "" if folder.is_dir() else "; the folder does not exist yet"
        say(f"{folder}: {server.url}{asks}{missing} (Ctrl-C ends)")
        server.serve_forever()
