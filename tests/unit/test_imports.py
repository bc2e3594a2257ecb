"""Packages import nothing heavy: a recipe, a plan or a row format is read without waiting for torch."""

from __future__ import annotations

import subprocess
import sys

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
