"""Record a command in a terminal and as a log, for the pages that show what a user sees.

    python docs/record_session.py NAME RUN_FOLDER COMMAND ...

The command runs twice, each time without RUN_FOLDER, which is removed before. The first time it runs in a
pseudo-terminal of 110 columns, whose lines become docs/images/NAME.svg. The second time its output goes to a file,
docs/sessions/NAME.txt. The environment variable SESSION_LINES limits the picture to its last lines. Paths of the
working directory are written as `.`. Needs pyte, a terminal emulator, and rich.
"""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

COLUMNS, ROWS, HISTORY = 110, 40, 2000
DOCS = Path(__file__).resolve().parent
COLORS = {"brown": "yellow", "default": ""}
"""Names of pyte that rich does not have."""


def in_a_terminal(command: list[str]) -> tuple[pyte.HistoryScreen, int]:
    """Run the command in a pseudo-terminal; returns the emulated screen and the exit code."""
    screen = pyte.HistoryScreen(COLUMNS, ROWS, history=HISTORY, ratio=0.5)
    stream = pyte.ByteStream(screen)
    process, descriptor = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    while True:
        try:
            content = os.read(descriptor, 65536)
        except OSError:  # Linux reports the end of the other side as an input/output error
            break
        if not content:
            break
        stream.feed(content)
    return screen, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def styled(screen: pyte.HistoryScreen) -> list[Text]:
    """The scrolled lines and those on the screen, with their colours."""
    lines = []
    for row in [*screen.history.top, *(screen.buffer[number] for number in range(screen.lines))]:
        line = Text()
        for column in range(COLUMNS):
            cell = row[column]
            color = COLORS.get(cell.fg, cell.fg)
            if color and color[0] in "0123456789abcdef" and len(color) == 6:
                color = f"#{color}"
            line.append(cell.data, style=" ".join(filter(None, ["bold" if cell.bold else "", color])))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def as_log(command: list[str]) -> tuple[str, int]:
    """Run the command with its output in a file; returns the text and the exit code."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout, done.returncode


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit("usage: python docs/record_session.py NAME RUN_FOLDER COMMAND ...")
    name, folder, command = sys.argv[1], sys.argv[2], sys.argv[3:]
    shutil.rmtree(folder, ignore_errors=True)
    screen, code = in_a_terminal(command)
    if code != 0:
        sys.exit(f"{name}: the command ended with exit code {code} in the terminal; nothing was written.")
    lines = styled(screen)[-int(os.environ.get("SESSION_LINES", HISTORY)) :]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in lines:
            line.plain = line.plain.replace(f"{os.getcwd()}/", "./")
            console.print(line)
    console.save_svg(str(DOCS / "images" / f"{name}.svg"), title=" ".join(command))
    shutil.rmtree(folder)
    text, code = as_log(command)
    if code != 0:
        sys.exit(f"{name}: the command ended with exit code {code} when its output went to a file.")
    (DOCS / "sessions").mkdir(exist_ok=True)
    (DOCS / "sessions" / f"{name}.txt").write_text(text.replace(f"{os.getcwd()}/", "./"), encoding="utf-8")
    print(f"{name}: {len(lines)} lines in the terminal, {len(text.splitlines())} in the log.")


if __name__ == "__main__":
    main()
