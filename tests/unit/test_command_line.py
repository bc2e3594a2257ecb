"""The command line: help by task, examples, completion, `--json`, exit statuses, and the nearest name for a typo."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from align import cli
from align.cli import build_parser
from align.cli.parser import EXIT_STATUS, GROUPS, examples_of, leaves, subcommands
from align.errors import Stopped, UserError

ROOT = Path(__file__).parents[2]
LEAVES = leaves(build_parser())
NAMES = [command.prog.removeprefix("align ") for command in LEAVES]
WITHOUT_JSON = {
    "run": "`align report RUN --json` has the results",
    "chat": "a conversation",
    "watch": "a server",
    "serve": "a server",
    "serve-rollout": "a server",
    "serve-reward": "a server",
    "convert hot-start": "prints the path of the result",
    "convert language-model": "prints the path of the result",
    "convert tokenizer": "prints the path of the result",
    "completion": "prints a script",
}
"""{command without `--json`: reason}."""


def said(capsys, *arguments: str, status: int = 2) -> str:
    """The standard error of a command that ends with `status`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == status
    return capsys.readouterr().err


def test_the_help_lists_every_command_once_under_a_task(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] not in " -"]
    assert sorted(listed) == sorted({name.split()[0] for name in NAMES})
    assert "other commands:" not in lines
    assert [line for line in lines if line.endswith(":")] == [*(f"{title}:" for title in GROUPS), "options:"]


@pytest.mark.parametrize("command", LEAVES, ids=NAMES)
def test_every_command_has_examples_that_parse(command) -> None:
    lines = examples_of(command)
    assert lines
    for line in lines:
        program, *words = shlex.split(line.partition(" > ")[0], comments=True)
        assert program == "align"
        assert cli.parse(words).parser.prog == command.prog, line


def test_an_example_with_a_wrong_option_is_noticed() -> None:
    with pytest.raises(SystemExit):
        cli.parse(["run", "tiny", "--resum-now"])


def test_every_result_that_a_script_reads_is_available_as_json() -> None:
    without = [name for name, command in zip(NAMES, LEAVES) if "--json" not in command._option_string_actions]
    assert sorted(without) == sorted(WITHOUT_JSON)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rnu"], "align: 'rnu' is not a command. Did you mean `align run`?"),
        (["merge"], "align: 'merge' is not a command. Did you mean `align adapter merge`?"),
        (["train"], "align: 'train' is not a command. Did you mean `align run`?"),
        (["adapter", "chekc"], "align adapter: 'chekc' is not a command. Did you mean `align adapter check`?"),
        (["qqq"], "align: 'qqq' is not a command. See `align --help`."),
        (["run", "tiny", "--rsume"], "align run: '--rsume' is not an option. Did you mean '--resume'?"),
        (["chat", "a", "b"], "align chat: 'b' is one argument too many. See `align chat --help`."),
        (["eval", "x", "--backend", "vlm"], "align eval: --backend vlm: not a valid value. Did you mean 'vllm'?"),
        (["run"], "align run: the following arguments are required: recipe. See `align run --help`."),
    ],
)
def test_a_typo_is_answered_by_the_nearest_name(arguments: list[str], sentence: str, capsys) -> None:
    assert said(capsys, *arguments) == f"error: {sentence}\n"


@pytest.mark.parametrize(
    "words", [["run"], ["check"], ["show"], ["sweep"], ["plan"], ["data", "show"], ["serve-rollout"]]
)
def test_every_command_that_takes_a_recipe_names_the_nearest_one(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "tinny", *(["sft"] if words[0] == "data" else [])])
    assert ended.value.code == 2
    sentence = "tinny: not a file and not a shipped recipe; did you mean 'tiny'?"
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (UserError("nowhere: not a recipe."), 2),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (Stopped(signal.SIGTERM), 143),
        (None, 0),
    ],
)
def test_exit_statuses(failure: BaseException | None, status: int, monkeypatch) -> None:
    def fail(*_: object) -> None:
        if failure is not None:
            raise failure

    monkeypatch.setattr("align.cli.runs._show", fail)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    code = 0
    try:
        cli.main(["show", "tiny"])
    except SystemExit as ended:
        code = ended.code
    assert code == status
    assert status in EXIT_STATUS


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr("align.cli.runs._show", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # with which Python exits with status 1
        cli.main(["show", "tiny"])


def test_counts_of_a_conversion_as_json(tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi", "completion": "Hello"}\n{"prompt": "Hi", "completion": " "}\n')
    cli.main(["data", "convert", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--json"])
    counts = json.loads(capsys.readouterr().out)
    assert (counts["read"], counts["shapes"], sum(counts["dropped"].values())) == (2, {"prompt_completion": 1}, 1)


def test_quiet_prints_problems_only(capsys) -> None:
    cli.main(["check", "tiny", "--without-files", "--quiet"])
    assert "ALIGN_QUIET" not in os.environ  # the next command of this process prints
    assert capsys.readouterr() == ("", "")
    assert "stages.dpo.beta" in said(capsys, "check", "tiny", "--without-files", "--quiet", "stages.dpo.beta=-1")


def test_quiet_leaves_out_lines_of_progress(monkeypatch, capsys) -> None:
    from align.cli import terminal

    monkeypatch.setenv(terminal.QUIET, "1")
    for show in (terminal.say, terminal.status, terminal.progress):
        show("sft: step 1")
    assert capsys.readouterr().out == ""


def test_an_empty_line_stays_empty_on_a_terminal(monkeypatch, capsys) -> None:
    from align.cli import terminal

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal.say("")
    assert capsys.readouterr().out == f"{terminal.ERASE}\n"


COMPLETED = {
    "align ru": ["run"],
    "align adapter c": ["check", "combine"],
    "align run tiny --res": ["--resume"],
    "align run quicks": ["quickstart"],
    "align run tiny --only pr": ["pretrain"],
    "align run quickstart --only pretr": [],  # that recipe has no such stage
    "align data show tiny re": ["reward_model"],
    "align run tiny stages.dpo.be": ["stages.dpo.beta="],
    "align check tiny stages.sft.optimizer.learning_": ["stages.sft.optimizer.learning_rate="],
    "align eval x --backend ": ["hf", "vllm"],
    "align show-model hunyuan": ["hunyuan-large"],
    "align completion ": ["bash", "fish", "zsh"],
}
"""{a line that ends at the cursor: words that complete it}."""


def test_words_are_completed(tmp_path: Path) -> None:
    """In one process of its own, since argcomplete takes file descriptors that pytest uses."""
    code = (
        "import io, json, os, sys\n"
        "from align.cli import build_parser, completion\n"
        "os.environ |= {'_ARGCOMPLETE': '1', '_ARGCOMPLETE_IFS': chr(10)}\n"
        "found = {}\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    os.environ |= {'COMP_LINE': line, 'COMP_POINT': str(len(line))}\n"
        "    parser, out = build_parser(), io.StringIO()\n"
        "    try: completion.complete(parser, exit_method=sys.exit, output_stream=out)\n"
        "    except SystemExit: pass\n"
        "    found[line] = sorted(word.strip() for word in out.getvalue().split(chr(10)) if word.strip())\n"
        "print(json.dumps(found))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(COMPLETED))],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert json.loads(ended.stdout) == COMPLETED, ended.stderr


SCRIPTS = {
    "bash": 'eval "$(align completion bash)"; COMP_WORDS=(align run quicks); COMP_CWORD=2; COMP_POINT=16; '
    'COMP_LINE="align run quicks"; _python_argcomplete align; echo "${COMPREPLY[@]}"',
    "fish": 'align completion fish | source; complete --do-complete "align run quicks"',
    "zsh": 'autoload -Uz compinit; compinit -u -d "$HOME/dump"; eval "$(align completion zsh)"; '
    'echo "${_comps[align]}"',
}


@pytest.mark.parametrize(("shell", "answer"), [("bash", "quickstart"), ("fish", "quickstart"), ("zsh", "_argcomplete")])
def test_the_scripts_work_in_the_shells(shell: str, answer: str, tmp_path: Path) -> None:
    """bash and fish complete a recipe; zsh registers the function (completion itself needs a terminal)."""
    if not any((Path(folder) / shell).is_file() for folder in os.get_exec_path()):
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "align"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m align.cli "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    ended = subprocess.run(
        [shell, "-c", SCRIPTS[shell]], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
    )
    assert answer in ended.stdout, ended.stderr


def test_the_help_imports_neither_recipes_nor_torch() -> None:
    """Recipes take 0.3 s of processor time, torch several seconds; the whole help takes 0.2 s on an idle core."""
    code = (
        "import sys, time, resource, align.cli\n"
        "try: align.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'yaml', 'rich', 'numpy', 'argcomplete'} & set(sys.modules)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, sorted(heavy), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    seconds, loaded = ended.stderr.split(" ", 1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 1.0  # busy machine


def test_the_tables_of_the_page_are_up_to_date() -> None:
    make_cli = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))
    page = make_cli["PAGE"].read_text(encoding="utf-8")
    assert make_cli["fill"](page) == page, "run `python docs/make_cli.py`"
    assert make_cli["fill"](page.replace("| 2 | wrong", "| 3 | wrong")) == page


def test_groups_name_only_commands() -> None:
    known = {command.prog.removeprefix("align ") for command in subcommands(build_parser())}
    assert {name for names in GROUPS.values() for name in names} <= known


def test_the_options_on_their_page_are_the_parsers() -> None:
    make_cli = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))
    page = make_cli["OPTIONS"].read_text(encoding="utf-8")
    assert make_cli["options_page"]() == page, "run `python docs/make_cli.py`"
    (run,) = (command for command in LEAVES if command.prog == "align run")
    section = page.split("## align run\n")[1].split("\n## ")[0]
    flags = [set(re.findall(r"--[a-z][a-z-]+", text)) for text in (run.format_help(), section)]
    assert flags[0] - {"--help"} == flags[1]
