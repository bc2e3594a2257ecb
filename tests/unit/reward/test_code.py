"""Rewards for programs: the program in a completion, the three forms of tests, scores, and messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.config.rewards import CodeReward
from align.errors import UserError
from align.reward.code import Cases, UnitTests, build_sandbox, extract_program, read_tests, score_all, score_one
from align.reward.sandbox.confine import missing_wall
from align.reward.sandbox.sandbox import Sandbox

HUMANEVAL = {
    "prompt": "from typing import List\n\ndef helper(x):\n    return x + 1\n\n\n"
    "def double(x: int) -> int:\n    '''Twice x.'''\n",
    "entry_point": "double",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n"
    "    assert candidate(2) == 4\n    assert helper(candidate(3)) == 7\n",
}
MBPP = {"test_list": ["assert double(2) == 4", "assert double(-1) == -2", "assert double(0) == 0"]}
PROGRAM = {"tests": {"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]}}


def reward(**settings: Any) -> CodeReward:
    return CodeReward(kind="code", timeout_s=60, **settings)


@pytest.fixture(scope="module")
def box() -> Sandbox:
    if missing_wall():
        pytest.skip(f"no sandbox here: {missing_wall()}")
    return build_sandbox(reward())


# --- the program ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("print(1)", "print(1)"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\nBetter:\n```py\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\ny =", "x = 1\ny ="),
        ("<think>```python\nx = 0\n```</think>x = 1", "x = 1"),
        ("Use `x` and ```y``` here", "Use `x` and ```y``` here"),
    ],
)
def test_the_last_block_is_the_program(completion: str, program: str) -> None:
    assert extract_program(completion) == program


def test_a_completion_that_continues_the_prompt_ends_with_the_body() -> None:
    prefix = "import math\n\ndef f(x):\n"
    assert extract_program("    return x\n\ndef g():\n    pass", prefix, "f") == prefix + "    return x\n"
    assert extract_program("    return x\n# usage\nf(1)", prefix, "f") == prefix + "    return x"
    assert extract_program("```python\n    return x\n```", prefix, "f") == prefix + "    return x\n"


def test_a_completion_that_defines_the_function_keeps_imports_and_helpers_of_the_prompt() -> None:
    prefix = "import math\n\ndef f(x):\n    '''Doc.'''\n"
    text = "Usage:\n```python\ndef f(x):\n    return 1\n```\nExample:\n```python\nf(3)\n```"
    assert extract_program(text, prefix, "f") == "import math\n\ndef f(x):\n    return 1\n"


# --- scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("    return 2 * x\n", 1.0),
        ("    return 2 * x\n\ndef helper(x):\n    return 0\n", 1.0),  # what follows the body is not run
        ("```python\ndef double(x):\n    return x + x\n```", 1.0),
        ("    return x + 2\n", 0.0),
        ("    return 2 *\n", 0.0),
        ("", 0.0),
        ("```python\nclass E:\n    def __eq__(self, other): return True\ndef double(x):\n    return E()\n```", 0.0),
    ],
)
def test_humaneval(box: Sandbox, completion: str, score: float) -> None:
    assert score_one(reward(), box, completion, HUMANEVAL).score == score


def test_mbpp_and_the_share_of_tests(box: Sandbox) -> None:
    square = "```python\ndef double(x): return x * x\n```"  # right for 2 and 0
    assert score_one(reward(column="test_list"), box, square, MBPP).score == 0.0
    assert score_one(reward(column="test_list", score="share"), box, square, MBPP).score == pytest.approx(2 / 3)


def test_mbpp_runs_its_setup(box: Sandbox) -> None:
    row = {
        "test_list": ["assert f(root) == 4"],
        "test_imports": ["import math"],
        "test_setup_code": "root = math.isqrt(9)",
    }
    assert score_one(reward(column="test_list"), box, "def f(x): return x + 1", row).score == 1.0


@pytest.mark.parametrize("test", ["assert sum(10, 15) == 6", "assert (sum(10, 15)) == 6"])
def test_a_function_with_a_built_in_name_can_be_tested(box: Sandbox, test: str) -> None:
    row = {"test_list": [test]}
    assert score_one(reward(column="test_list"), box, "def sum(a, b): return 6", row).score == 1.0


def test_a_program_cannot_replace_a_built_in_of_the_test(box: Sandbox) -> None:
    row = {"test_list": ["assert abs(f(1) - 5) < 0.1"]}
    code = "def abs(x): return 0\ndef f(x): return 1"
    assert score_one(reward(column="test_list"), box, code, row).score == 0.0


def test_whole_programs(box: Sandbox) -> None:
    add, first = "a, b = map(int, input().split())\nprint(a + b)", "print(3)"
    settings = {"column": "tests"}
    assert score_one(reward(**settings), box, add, PROGRAM).score == 1.0
    found = score_one(reward(**settings), box, first, PROGRAM)
    assert (found.score, found.reason) == (0.0, "printed '3\\n' instead of '10\\n'")
    assert score_one(reward(score="share", **settings), box, first, PROGRAM).score == 0.5


def test_completions_are_scored_together_and_unscored_ones_are_reported(box: Sandbox) -> None:
    row = {"test": "assert apply(lambda: 1) == 1"}
    good, other = {"test": "assert f() == 1"}, {"test": "assert f() == 2"}
    code = "def f(): return 1\ndef apply(g): return g()"
    scored = score_all(reward(workers=3), box, [code] * 3, [good, row, other])
    assert scored.scores == [1.0, None, 0.0]
    assert scored.problem == "a test passes an object of type function, which is not plain data"


# --- forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        {"inputs": ["1"], "outputs": ["2"]},
        {"input": ["1"], "output": ["2"]},
        [{"input": "1", "output": "2"}],
        json.dumps({"inputs": ["1"], "outputs": ["2"]}),
        json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}]),
    ],
)
def test_forms_of_cases(cell: Any) -> None:
    assert read_tests(reward(), {"test": cell}) == Cases(["1"], ["2"])


def test_forms_of_unit_tests() -> None:
    assert read_tests(reward(), {"test": "assert f()"}) == UnitTests(["assert f()"])
    assert read_tests(reward(), {"test": '["assert f()"]'}) == UnitTests(["assert f()"])
    found = read_tests(reward(), HUMANEVAL)
    assert isinstance(found, UnitTests)
    assert found.tests[0].endswith("check(double)")


@pytest.mark.parametrize(
    "cell",
    [
        3,
        [],
        {"inputs": ["1"], "outputs": []},
        {"inputs": [[1]], "outputs": [1]},
        {"fn_name": "f", "inputs": ["1"], "outputs": ["1"]},
        [1],
    ],
)
def test_other_forms_are_refused(cell: Any) -> None:
    with pytest.raises(UserError, match="no tests of a known form"):
        read_tests(reward(), {"test": cell})
