"""Score programs that a model wrote by the tests of their row, in a sandbox.

Three forms of tests are known by their value:

    HumanEval   a text that defines `check(candidate)`, and a row with the function's name as its entry point
    MBPP        assert statements: a list of texts, or one text
    programs    inputs and expected outputs of a whole program, as {"inputs": [...], "outputs": [...]}, as a list of
                {"input": ..., "output": ...}, or as JSON text of either

Outputs of programs are compared word by word, so white space does not matter.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from align.config.rewards import CodeReward
from align.errors import UserError
from align.reward.process import Scored
from align.reward.sandbox.sandbox import Limits, Sandbox
from align.reward.text import Row, is_missing
from align.reward.verifiers import Sample, verifier

_FENCE = re.compile(r"^ *```[^\n`]*\n(.*?)(?:^ *```|\Z)", re.DOTALL | re.MULTILINE)
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that end a function's body that continues a prompt (Chen et al. 2021, arXiv 2107.03374)."""
_CHECK = re.compile(r"^def check\(", re.MULTILINE)


@dataclass(frozen=True)
class UnitTests:
    """Statements to run against what a program defines.

    setup: statements before the first test. entry_point: name of the function under test; empty if unknown.
    """

    tests: list[str]
    setup: str = ""
    entry_point: str = ""


@dataclass(frozen=True)
class Cases:
    """Inputs and expected outputs of a whole program."""

    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class CodeScore:
    """Score of one program.

    score: 1 or 0, or the share of tests that passed; None if no test could be run.
    reason: why the first failing test failed; empty if all passed.
    """

    score: float | None
    reason: str = ""


def build_sandbox(reward: CodeReward) -> Sandbox:
    """The sandbox that a reward's settings describe. Raises UserError if this machine has no sandbox."""
    limits = Limits(wall_s=reward.timeout_s, cpu_s=reward.cpu_s, memory_bytes=reward.memory_mb << 20)
    try:
        return Sandbox(limits, unsafe=reward.unsafe)
    except UserError as error:
        raise UserError(f"reward '{reward.label}': {error}") from None


@verifier(CodeReward)
def verify_code(reward: CodeReward, sample: Sample) -> float | None:
    """Score of one completion; `components` scores many at a time in one sandbox."""
    return score_one(reward, build_sandbox(reward), sample.text, sample.row).score


def score_all(reward: CodeReward, box: Sandbox, texts: Sequence[str], rows: Sequence[Row]) -> Scored:
    """Scores of some completions; `workers` of them run at a time."""
    with ThreadPoolExecutor(reward.workers or len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(partial(score_one, reward, box), texts, rows))
    unscored = [result.reason for result in found if result.score is None]
    return Scored([result.score for result in found], unscored[-1] if unscored else "")


def score_one(reward: CodeReward, box: Sandbox, text: str, row: Row) -> CodeScore:
    """Score of one completion. Raises UserError if its row has no tests of a known form."""
    tests = read_tests(reward, row)
    if isinstance(tests, Cases):
        return _run_cases(box, extract_program(text), tests, share=reward.score == "share")
    prefix = row.get(reward.prefix)
    ran = box.run_tests(
        extract_program(text, prefix if isinstance(prefix, str) else "", tests.entry_point),
        tests.tests,
        setup=tests.setup,
        entry_points=[tests.entry_point] if tests.entry_point else _entry_points(tests.tests),
    )
    passed = [result for result in ran.passed if result is not None]
    reason = next((reason for result, reason in zip(ran.passed, ran.reasons, strict=True) if not result), "")
    if not passed or (reward.score == "all" and all(passed) and len(passed) < len(ran.passed)):
        return CodeScore(None, reason)
    return CodeScore(sum(passed) / len(passed) if reward.score == "share" else float(all(passed)), reason)


def _run_cases(box: Sandbox, code: str, cases: Cases, *, share: bool) -> CodeScore:
    passed, first = 0, ""
    for stdin, expected in zip(cases.inputs, cases.outputs, strict=True):
        run = box.run_program(code, stdin)
        if run.ended and run.output.split() == expected.split():
            passed += 1
            continue
        first = first or run.problem or f"printed {run.output[:60]!r} instead of {expected[:60]!r}"
        if not share:
            break
    total = len(cases.inputs)
    return CodeScore(passed / total if share else float(passed == total), first)


# --- the program ---------------------------------------------------------------------------------------------


def extract_program(completion: str, prefix: str = "", entry_point: str = "") -> str:
    """The program of a completion: its last fenced block, or all of it.

    prefix: beginning of the program. If the completion defines the entry point itself, only what is before the entry
    point there (imports and helper functions) is kept. Otherwise the completion is the rest of its body, which ends
    before the first statement that is not indented.
    """
    text = completion.rpartition("</think>")[2]
    blocks = _FENCE.findall(text)
    defines = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE) if entry_point else None
    if defines:
        blocks = [block for block in blocks if defines.search(block)] or blocks
    code = blocks[-1] if blocks else text
    if not defines or not (start := defines.search(prefix)):
        return code
    if defines.search(code):
        return prefix[: start.start()] + code
    ends = [place for stop in _STOPS if (place := code.find(stop)) >= 0]
    return prefix + (code[: min(ends)] if ends else code)


# --- the tests -----------------------------------------------------------------------------------------------


def read_tests(reward: CodeReward, row: Row) -> UnitTests | Cases:
    """The tests of a row. Raises UserError if they have none of the known forms."""
    cell, where = row[reward.column], f"reward '{reward.label}': the column '{reward.column}'"
    if isinstance(cell, str) and cell.lstrip()[:1] in ("{", "["):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise UserError(f"{where} starts like JSON, but is not JSON ({error}). Correct it.") from None
    entry_point = row.get(reward.entry_point)
    name = entry_point.strip() if isinstance(entry_point, str) else ""
    if isinstance(cell, str):
        if _CHECK.search(cell):
            if not name:
                raise UserError(
                    f"{where} defines `check(candidate)`, but the row has no function's name in the column "
                    f"'{reward.entry_point}'. Set the reward's `entry_point` to the column with the name."
                )
            return UnitTests([f"{cell}\n\ncheck({name})"], entry_point=name)
        return UnitTests([cell], _setup(row), name)
    items = list(cell) if isinstance(cell, list | tuple) else []
    if items and all(isinstance(item, str) for item in items):
        return UnitTests(items, _setup(row), name)
    if items and all(isinstance(item, dict) for item in items):
        keys = ("input", "output")
        cell = {key: [item.get(key) for item in items] for key in keys}
    if isinstance(cell, dict) and not cell.get("fn_name"):
        inputs, outputs = (cell.get(key, cell.get(f"{key}s")) for key in ("input", "output"))
        if inputs and outputs and _are_texts(inputs) and _are_texts(outputs) and len(inputs) == len(outputs):
            return Cases(list(inputs), list(outputs))
    raise UserError(
        f"{where} has no tests of a known form. Write a text with `def check(candidate)`, a list of assert statements, "
        'or {"inputs": [...], "outputs": [...]} with texts.'
    )


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(value, str) for value in values)


def _setup(row: Row) -> str:
    """MBPP's statements before the tests."""
    imports, code = row.get("test_imports"), row.get("test_setup_code")
    lines = [line for line in imports if isinstance(line, str)] if isinstance(imports, list | tuple) else []
    return "\n".join([*lines, code] if isinstance(code, str) and not is_missing(code) else lines)


def _entry_points(tests: Sequence[str]) -> list[str]:
    """Built-in names that are the program's own, such as `sum` in MBPP's `assert sum(10, 15) == 6`.

    They are so only if the tests call nothing else: otherwise a program could replace the `abs` of a test.
    """
    try:
        calls = [node.func for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError):
        return []
    names = {function.id for function in calls if isinstance(function, ast.Name)}
    return sorted(names) if names <= set(dir(builtins)) else []
