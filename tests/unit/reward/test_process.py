"""Users' functions run in a separate process: every fault is reported, and no function runs on after its call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.errors import UserError
from align.reward import process as process_module
from align.reward.process import FunctionProcess, UserFunction

COMPLETIONS = ["a", "bb", "ccc", "dddd"]
MINE = """
import asyncio, ctypes, os, subprocess, sys, time
from beside import FACTOR

def process_id(prompts, completions, rows):
    return [os.getpid()] * len(rows)

def batched(prompts, completions, rows):
    return [FACTOR * len(c) + row["n"] for c, row in zip(completions, rows)]

def single(prompt, completion, row):
    return FACTOR * len(completion) + row["n"]

async def batched_async(prompts, completions, rows):
    await asyncio.sleep(0)
    return batched(prompts, completions, rows)

async def single_async(prompt, completion, row):
    await asyncio.sleep(0.2)
    return single(prompt, completion, row)

def prints(prompts, completions, rows):
    print("seen", len(completions))
    return [0.0] * len(rows)

def raises(prompts, completions, rows):
    return [1 / (len(c) - 3) for c in completions]

def raises_together(prompts, completions, rows):
    if len(completions) > 1:
        raise ValueError("too many")
    return [1.0]

def raises_single(prompt, completion, row):
    return int("x") if completion == "ccc" else 1.0

def exits(prompt, completion, row):
    sys.exit("enough") if completion == "ccc" else None
    return 1.0

def hangs(prompts, completions, rows):
    while True:
        pass

def hangs_in_c(prompts, completions, rows):
    ctypes.PyDLL(None).sleep(100)  # PyDLL keeps the interpreter's lock: no thread of Python runs meanwhile

def hangs_single(prompt, completion, row):
    if completion == "ccc":
        time.sleep(100)
    return 1.0

async def blocks_the_loop(prompt, completion, row):
    if completion == "a":
        raise ValueError("first")
    await asyncio.sleep(0.1)
    time.sleep(100)

def raises_far_away(prompt, completion, row):
    import json
    return json.loads(completion)

async def hangs_async(prompt, completion, row):
    await asyncio.sleep(100 if completion == "ccc" else 0)
    return 1.0

def dies(prompt, completion, row):
    if completion == "ccc":
        os._exit(3)
    return 1.0

def segfaults(prompts, completions, rows):
    ctypes.string_at(0)

def leaves_a_child(prompts, completions, rows):
    open("child", "w").write(str(subprocess.Popen(["sleep", "100"]).pid))
    time.sleep(100)

def text(prompt, completion, row):
    return "1.0"

def nothing(prompt, completion, row):
    return None if completion == "ccc" else 1.0

def infinite(prompt, completion, row):
    return float("inf") if completion == "ccc" else 1.0

def never(prompt, completion, row):
    raise RuntimeError("never")

def two(first, second):
    return 1.0

def total(prompt, completion, row):
    return len(completion)

def numbers(prompts, completions, rows):
    import fractions, numpy
    return numpy.array([1, 2, 3], dtype="int8").tolist() + [fractions.Fraction(1, 2)]

def array(prompts, completions, rows):
    import numpy
    return numpy.ones(len(rows), dtype="float32")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    (folder / "beside.py").write_text("FACTOR = 10\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def functions() -> Iterator[FunctionProcess]:
    with FunctionProcess() as functions:
        yield functions


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def mine(name: str, batched: bool = True, timeout_s: float = 30.0, tolerant: bool = False) -> UserFunction:
    return UserFunction(f"mine.py:{name}", "mine.py", name, batched, timeout_s, tolerant)


def score(functions: FunctionProcess, function: UserFunction) -> list[float | None]:
    rows = [{"n": n} for n in range(4)]
    return functions.score(function, ["p"] * 4, COMPLETIONS, rows).scores


def refusal(functions: FunctionProcess, function: UserFunction) -> str:
    with pytest.raises(UserError) as caught:
        score(functions, function)
    return str(caught.value).removeprefix(f"reward function '{function.label}' ")


@pytest.mark.parametrize(
    ("name", "batched"), [("batched", True), ("single", False), ("batched_async", True), ("single_async", False)]
)
def test_all_four_kinds_of_function(functions, name: str, batched: bool) -> None:
    assert score(functions, mine(name, batched)) == [10.0, 21.0, 32.0, 43.0]


def test_functions_share_one_separate_process(functions) -> None:
    first, second = score(functions, mine("process_id")), score(functions, mine("process_id"))
    assert first == second
    assert first[0] != os.getpid()


def test_awaited_calls_run_concurrently(functions) -> None:
    score(functions, mine("single", batched=False))
    start = time.perf_counter()
    score(functions, mine("single_async", batched=False))  # each sleeps for 0.2 s
    assert time.perf_counter() - start < 0.6


def test_every_value_that_converts_to_a_float_is_a_score(functions) -> None:
    assert score(functions, mine("numbers")) == [1.0, 2.0, 3.0, 0.5]
    assert score(functions, mine("array")) == [1.0] * 4


def test_prints_of_a_function_appear(functions, folder: Path) -> None:
    program = (
        "from align.reward.process import *\n"
        "function = UserFunction('f', 'mine.py', 'prints', True, 30.0)\n"
        "print(FunctionProcess().score(function, ['p'], ['c'], [{}]).scores)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "seen 1\n[0.0]\n"


def test_an_exception_names_the_function_the_completion_and_the_line(functions) -> None:
    line = MINE.splitlines().index("    return [1 / (len(c) - 3) for c in completions]") + 1
    message = f"raised ZeroDivisionError: division by zero (mine.py line {line}) for completion 2 ('ccc')"
    assert refusal(functions, mine("raises")) == f"{message}. Fix the function."
    assert "ValueError: too many" in refusal(functions, mine("raises_together"))
    assert "invalid literal" in (message := refusal(functions, mine("raises_single", batched=False)))
    assert "for completion 2 ('ccc')" in message
    assert "SystemExit: enough" in refusal(functions, mine("exits", batched=False))


def test_the_line_is_in_the_users_file(functions) -> None:
    line = MINE.splitlines().index("    return json.loads(completion)") + 1
    message = refusal(functions, mine("raises_far_away", batched=False))
    assert message.startswith("raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) (mine.py line ")
    assert f"(mine.py line {line}) for completion 0 ('a')" in message


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c"])
def test_a_hanging_function_is_killed(functions, name: str) -> None:
    functions.load(mine(name))
    start = time.perf_counter()
    message = refusal(functions, mine(name, timeout_s=0.5))
    assert message == "took longer than 0.5 s. Fix the function, or raise its timeout_s."
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("name", ["hangs_single", "hangs_async"])
def test_a_hang_names_the_completion(functions, name: str) -> None:
    message = refusal(functions, mine(name, batched=False, timeout_s=0.5))
    assert message == "took longer than 0.5 s for completion 2 ('ccc'). Fix the function, or raise its timeout_s."


def test_a_hang_among_awaited_calls_names_no_completion(functions, monkeypatch) -> None:
    """One call blocks the event loop, so no call can report its own timeout."""
    monkeypatch.setattr(process_module, "GRACE_S", 0.2)
    functions.load(mine("blocks_the_loop", batched=False))
    function = mine("blocks_the_loop", batched=False, timeout_s=0.5, tolerant=True)
    assert refusal(functions, function) == "took longer than 0.5 s. Fix the function, or raise its timeout_s."


def test_a_crash_of_the_process_is_the_functions_fault(functions) -> None:
    message = refusal(functions, mine("dies", batched=False))
    assert message == "ended its process (exit status 3) for completion 2 ('ccc'). Fix the function."
    assert refusal(functions, mine("segfaults")) == "ended its process (signal SIGSEGV). Fix the function."
    assert score(functions, mine("single", batched=False))  # works in a new process


def test_children_of_a_hanging_function_are_killed(functions, folder: Path) -> None:
    refusal(functions, mine("leaves_a_child", timeout_s=1.0))
    child = int((folder / "child").read_text())
    assert gone(child)


def test_bad_numbers_name_the_completion(functions) -> None:
    assert refusal(functions, mine("text", batched=False)).startswith("returned '1.0' for completion 0 ('a')")
    assert "returned None for completion 2 ('ccc')" in refusal(functions, mine("nothing", batched=False))
    assert "returned inf for completion 2 ('ccc')" in refusal(functions, mine("infinite", batched=False))
    assert "Set `batched: false`" in refusal(functions, mine("total"))


@pytest.mark.parametrize(
    "name", ["raises_single", "exits", "nothing", "infinite", "hangs_single", "hangs_async", "dies"]
)
def test_a_tolerant_function_may_lack_one_score(functions, name: str) -> None:
    function = mine(name, batched=False, timeout_s=0.5 if "hangs" in name else 30.0, tolerant=True)
    assert score(functions, function) == [1.0, 1.0, None, 1.0]


def test_tolerance_has_limits(functions) -> None:
    """A batched call that raises gives no scores at all. The number of restarts is limited, because a function that
    always hangs would delay the run once per completion."""
    assert "ZeroDivisionError" in refusal(functions, mine("raises", tolerant=True))
    assert score(functions, mine("never", batched=False, tolerant=True)) == [None] * 4
    always = UserFunction("mine.py:hangs_single", "mine.py", "hangs_single", False, 0.3, tolerant=True)
    with pytest.raises(UserError, match=r"took longer than 0\.3 s for completion 3"):
        functions.score(always, ["p"] * 9, ["ccc"] * 9, [{}] * 9)


def test_an_import_has_its_own_time_limit(functions, tmp_path, monkeypatch) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(1)\ndef f(prompt, completion, row): return 1.0\n")
    quick = UserFunction("f", str(slow), "f", False, timeout_s=0.5)
    functions.close()
    assert functions.score(quick, ["p"], ["c"], [{}]).scores == [1.0]  # importing took longer than timeout_s
    functions.close()
    monkeypatch.setattr(process_module, "IMPORT_TIMEOUT_S", 0.5)
    with pytest.raises(UserError, match=r"slow\.py: importing it took longer than 0\.5 s\. Fix the file\."):
        functions.load(quick)


def test_a_function_with_other_arguments_is_refused_on_loading(functions) -> None:
    with pytest.raises(UserError, match=r"mine\.py: 'two' does not take three arguments\. Write `def two\(prompt, "):
        functions.load(mine("two", batched=False))


def test_the_process_ends_when_its_parent_is_killed(folder: Path) -> None:
    program = (
        "from align.reward.process import *\n"
        "functions = FunctionProcess()\n"
        "functions.load(UserFunction('f', 'mine.py', 'hangs', True, 99.0))\n"
        "print(functions._process.pid, flush=True)\n"
        "functions.score(UserFunction('f', 'mine.py', 'hangs', True, 99.0), ['p'], ['c'], [{}])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.3)  # now the function is in its loop
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(worker)


def gone(process_id: int) -> bool:
    """Wait up to 10 s for the process to end or become a zombie; return True if it does."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
