"""The sandbox: attacks as this user and as nobody, programs and tests that must work, limits, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.errors import UserError
from align.reward.sandbox import confine, sandbox, wire
from align.reward.sandbox.sandbox import Limits, Sandbox

from .sandbox_attacks import attack

ROOT = Path(__file__).parents[3]
NOBODY = 65534

pytestmark = pytest.mark.skipif(bool(confine.missing_wall()), reason=f"no sandbox here: {confine.missing_wall()}")


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(Limits(wall_s=60))


def failures(found: dict[str, object]) -> dict[str, object]:
    assert len(found) > 30
    return {title: result for title, result in found.items() if result is not True}


@pytest.mark.slow
def test_no_attack_succeeds_as_this_user() -> None:
    assert failures(attack(bubblewrap="")) == {}


@pytest.mark.slow
def test_no_attack_succeeds_inside_bubblewrap() -> None:
    found = sandbox.find_bubblewrap(os.path.realpath(sys.executable))
    if not found:
        pytest.skip("bwrap is not installed, or may not create namespaces here")
    assert failures(attack(bubblewrap=found)) == {}


@pytest.fixture
def readable_copy() -> Iterator[Path]:
    """A folder that every user can read, with the package and the attacks."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("align/__init__.py", "align/errors.py", "align/reward/__init__.py", "align/reward/sandbox"):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        shutil.copy(ROOT / "tests/unit/reward/sandbox_attacks.py", folder)
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        yield folder


@pytest.mark.slow
def test_no_attack_succeeds_as_nobody(readable_copy: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become nobody")
    as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": (), "cwd": "/", "capture_output": True, "text": True}
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3.11", "/usr/bin/python3"):
        try:
            version = subprocess.run([python, "-c", "import sys; print(sys.version_info >= (3, 11))"], **as_nobody)
        except OSError:
            continue
        if version.stdout == "True\n":
            break
    else:
        pytest.skip("nobody can read no interpreter here")
    command = [python, str(readable_copy / "sandbox_attacks.py"), python, ""]
    ran = subprocess.run(command, env={"PYTHONPATH": str(readable_copy)}, check=False, **as_nobody)
    assert ran.returncode == 0, ran.stderr
    assert failures(json.loads(ran.stdout)) == {}


# --- what must work ------------------------------------------------------------------------------------------

MODULES = (
    "abc argparse array ast asyncio base64 bisect calendar cmath collections concurrent.futures contextlib copy csv "
    "ctypes dataclasses datetime decimal difflib email enum fractions functools gc glob hashlib heapq hmac html "
    "html.parser http inspect io itertools json keyword locale logging lzma math numbers operator os pathlib pickle "
    "platform pprint queue random re sched secrets shlex shutil signal sqlite3 ssl statistics string struct sys "
    "tempfile textwrap threading time timeit tokenize traceback types typing unicodedata unittest urllib.parse uuid "
    "weakref xml.etree.ElementTree zipfile zlib zoneinfo"
)

WORKING = f"""
import {MODULES.replace(" ", ", ")}
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    print(sum(pool.map(lambda x: x * x, range(10))))
async def later():
    await asyncio.sleep(0.01)
    return "later"
print(asyncio.run(later()))
print(sqlite3.connect(":memory:").execute("select 1 + 1").fetchone())
print(hashlib.md5(b"").hexdigest(), random.Random(0).random(), len(os.urandom(4)))
print(datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")).isoformat())
print(sys.stdin.read(), __name__, os.getcwd())
"""


def test_the_standard_library_works(box: Sandbox) -> None:
    run = box.run_program(WORKING, "input")
    assert run.ended, run.problem
    assert run.output.split("\n")[:-1] == [
        "285",
        "later",
        "(2,)",
        "d41d8cd98f00b204e9800998ecf8427e 0.8444218515250481 4",
        "2026-01-01T00:00:00+00:00",
        "input __main__ /",
    ]


def test_a_program_that_fails_says_why(box: Sandbox) -> None:
    run = box.run_program("print(1)\nraise KeyError('x')")
    assert (run.output, run.ended, run.problem) == ("1\n", False, "KeyError: 'x'")
    assert box.run_program("import sys; sys.exit(3)").problem == "exit status 3"


def test_large_input_and_output_do_not_block() -> None:
    run = Sandbox(Limits(wall_s=60, output_bytes=1 << 24)).run_program(
        "import sys\nfor line in sys.stdin: sys.stdout.write(line)", "x" * 99 + "\n" + "y\n" * 500_000
    )
    assert run.ended
    assert run.output == "x" * 99 + "\n" + "y\n" * 500_000


# --- tests against a program ---------------------------------------------------------------------------------

PROGRAM = """
from collections import Counter, namedtuple
import math, itertools

Point = namedtuple("Point", "x y")

class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next

    def push(self, value):
        return Node(value, self)

def count(text): return Counter(text)
def point(): return Point(1, 2)
def squares():
    for i in itertools.count(): yield i * i
def sort(values): values.sort()
def sum(a, b): return a + b + 100
def fail(): raise KeyError("no")
def own():
    class OwnError(Exception): pass
    raise OwnError("mine")
def same(x): return x
def head(values): return values[0]
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert count('aab') == {'a': 2, 'b': 1}",
        "assert point() == (1, 2) and type(point()) is tuple",
        "gen = squares(); assert [next(gen) for _ in range(4)] == [0, 1, 4, 9]",
        "import itertools\nassert list(itertools.islice(map(same, [1, 2]), 5)) == [1, 2]",
        "v = [3, 1, 2]; assert sort(v) is None and v == [1, 2, 3]",
        "n = Node(1).push(2); assert (n.value, n.next.value, n.next.next) == (2, 1, None)",
        "n = Node(1); n.value = 7; assert n.value == 7 and head([n]) == n",
        "try: fail()\nexcept KeyError as e: assert 'no' in str(e)\nelse: assert False",
        "try: own()\nexcept Exception as e: assert 'OwnError: mine' == str(e)",
        "assert math.sqrt(4) == 2 and abs(-1) == 1",
        "for x in (None, True, 3, -0.5, 'é\\ud800', b'ab', 1j, (1, [2, {3: {4}}]), frozenset({1}), range(3)):\n"
        "    assert same(x) == x and type(same(x)) is type(x)",
        "assert same(10**5000) == 10**5000",
        "import math\nassert math.isnan(same(float('nan'))) and same(float('-inf')) == float('-inf')",
    ],
)
def test_values_and_objects_cross_between_the_processes(box: Sandbox, test: str) -> None:
    ran = box.run_tests(PROGRAM, [test])
    assert (ran.passed, ran.reasons) == ([True], [""])


def test_a_built_in_name_is_the_programs_only_as_entry_point(box: Sandbox) -> None:
    tests = ["assert sum([1, 2]) == 3"], ["assert sum(1, 2) == 103"]
    assert box.run_tests(PROGRAM, tests[0]).passed == [True]
    assert box.run_tests(PROGRAM, tests[1]).passed == [False]
    assert box.run_tests(PROGRAM, tests[1], entry_points=["sum"]).passed == [True]


def test_each_test_has_its_verdict_and_reason(box: Sandbox) -> None:
    tests = ["assert x == 2", "assert same(1) == 2, 'not two'", "import sys; sys.exit(0)", "same(1)"]
    ran = box.run_tests("def same(x): return x", tests, setup="x = 2")
    assert ran.passed == [True, False, False, True]
    assert ran.reasons == ["", "AssertionError: not two", "SystemExit: 0", ""]


def test_a_value_that_cannot_cross_leaves_the_test_unscored(box: Sandbox) -> None:
    ran = box.run_tests("def apply(f, x): return f(x)", ["assert apply(lambda x: x, 1) == 1", "assert 1"])
    assert ran.passed == [None, True]
    assert ran.reasons[0] == "a test passes an object of type function, which is not plain data"


def test_a_program_that_does_not_run_fails_every_test(box: Sandbox) -> None:
    ran = box.run_tests("def f(:", ["assert 1", "assert 2"])
    assert ran.passed == [False, False]
    assert ran.reasons[0].startswith("the program raised SyntaxError")


def test_tests_before_the_time_limit_count() -> None:
    code = "def f(x):\n    while x: pass\n    return x"
    ran = Sandbox(Limits(wall_s=60, cpu_s=1)).run_tests(code, ["assert f(0) == 0", "f(1)", "assert f(0) == 0"])
    assert ran.passed == [True, False, False]


@pytest.mark.parametrize("value", [{1: [2.5, None, "x"]}, [(), set(), frozenset(), b""], {"a": {(1, 2): True}}])
def test_plain_values_survive_encoding(value: object) -> None:
    encoded = json.loads(json.dumps(wire.encode(value, id)))
    assert wire.decode(encoded, lambda number: number) == value


# --- refusals ------------------------------------------------------------------------------------------------


def test_a_machine_without_walls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "missing_wall", lambda: "it is too old")
    with pytest.raises(UserError, match="it is too old"):
        Sandbox()
    run = Sandbox(Limits(wall_s=60), unsafe=True).run_program("print(open('/etc/hostname').read() != '')")
    assert run.output == "True\n"


def test_a_launcher_that_cannot_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "BOOT", "import sys; sys.exit('no sandbox')")
    with pytest.raises(UserError, match="no sandbox"):
        Sandbox(Limits(wall_s=60)).run_program("print(1)")


def test_filters_name_each_call_once() -> None:
    for machine in ("x86_64", "aarch64"):
        numbers = [k for code, _, _, k in confine.filter_program(machine) if code == 0x15][1:]
        assert len(numbers) < 256
    x86, arm = ({entry.split()[i] for entry in confine._ALLOWED.split(",")} - {"-"} for i in (1, 2))
    entries = len(confine._ALLOWED.split(","))
    assert len(x86) == entries
    assert len(arm) == entries - sum(entry.split()[2] == "-" for entry in confine._ALLOWED.split(","))
