"""Parameters that take a recipe section are annotated with its type, so that mypy reports uses of a renamed field."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = {"stage", "context", "recipe", "rollout", "parallel", "optimizer_settings", "settings", "lora", "sampling"}
"""Parameters that hold a section of a recipe or a stage's context."""


def untyped(source: str) -> list[str]:
    """`function(parameter)` for every parameter in `SECTIONS` that has no annotation or `Any`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                annotation = ast.unparse(argument.annotation) if argument.annotation else "Any"
                if argument.arg in SECTIONS and "Any" in annotation.split("[")[0]:
                    found.append(f"{node.name}({argument.arg})")
    return found


def test_no_section_of_a_recipe_is_any() -> None:
    files = [file for folder in ("align", "reward", "eval", "recipes") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [f"{file.relative_to(ROOT)}: {name}" for file in files for name in untyped(file.read_text())] == []


@pytest.mark.parametrize(
    ("signature", "wanted"),
    [
        ("stage: Any", ["f(stage)"]),
        ("stage", ["f(stage)"]),
        ("*, context: StageContext, lora: Any = None", ["f(lora)"]),
        ("stage: DpoStage, other: Any", []),
    ],
)
def test_a_planted_one_is_found(signature: str, wanted: list[str]) -> None:
    assert untyped(f"def f({signature}): ...") == wanted
