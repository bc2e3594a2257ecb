"""Packages import nothing heavy: a recipe, a plan or a row format is read without waiting for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = "torch transformers trl peft datasets vllm deepspeed accelerate pandas pyarrow"
PROGRAM = """
import importlib, pkgutil, sys
heavy, packages = sys.argv[1].split(), sys.argv[2:]
for name in packages:
    package = importlib.import_module(name)
    assert not set(heavy) & set(sys.modules), (name, set(heavy) & set(sys.modules))
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + ".") if name in {inside!r} else ():
        importlib.import_module(module.name)
        assert not set(heavy) & set(sys.modules), (module.name, set(heavy) & set(sys.modules))
"""


@pytest.mark.parametrize(
    ("packages", "inside", "allowed"),
    [
        ("align.config align.errors align.run align.launch align.plan", "align.config align.run align.launch", ""),
        (
            "align.data align.data.shapes align.data.files align.data.splits align.data.tiktoken_file align.preflight",
            "",
            "",
        ),
        ("align.losses", "align.losses", "torch"),
    ],
)
def test_modules_that_load_nothing_heavy(packages: str, inside: str, allowed: str) -> None:
    """inside: packages whose modules are all imported too. allowed: heavy libraries that may be loaded."""
    program = PROGRAM.replace("{inside!r}", repr(set(inside.split())))
    heavy = " ".join(set(HEAVY.split()) - set(allowed.split()))
    done = subprocess.run([sys.executable, "-c", program, heavy, *packages.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BENCHMARKS = {
    file.stem: ast.parse(file.read_text()) for file in (Path(__file__).parents[2] / "benchmarks").glob("*.py")
}


def test_benchmarks_find_what_they_import_from_each_other() -> None:
    """They are scripts, so no other test imports most of them."""
    imports = [
        (name, node.module, alias.name)
        for name, tree in BENCHMARKS.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in BENCHMARKS
        for alias in node.names
    ]
    assert len(imports) > 50
    assert [found for found in imports if found[2] not in defined(BENCHMARKS[str(found[1])])] == []


def defined(module: ast.Module) -> set[str]:
    """Names that a module defines or imports at its top level."""
    names = {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {target.id for target in ast.walk(node) if isinstance(target, ast.Name)}
    return names
