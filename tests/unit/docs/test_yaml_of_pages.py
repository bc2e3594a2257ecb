"""The recipes and stages in the pages' YAML blocks are valid."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from align.config import stages
from align.config.load import read_yaml
from align.config.recipe import Recipe

ROOT = Path(__file__).parents[3]
BLOCK = re.compile(r'^(?P<indent> *)```yaml(?: title="[^"]*")?\n(?P<text>.*?)^ *```$', re.MULTILINE | re.DOTALL)
KINDS = {get_args(member.model_fields["kind"].annotation)[0] for member in get_args(get_args(stages.Stage)[0])}


def problem(content: dict[str, Any]) -> str | None:
    """Validation error of a recipe or of named stages; None for any other YAML."""
    try:
        if {"model", "stages"} <= content.keys():
            Recipe.model_validate(content)
        for stage in content.values():
            if isinstance(stage, dict) and stage.get("kind") in KINDS:
                TypeAdapter(stages.Stage).validate_python(stage)
    except ValidationError as error:
        return str(error)
    return None


def sections(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(page, content) of the blocks of the pages that are sections, as align reads a recipe."""
    found = []
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if path.name == "extending.md":  # its settings exist after its changes to the library
            continue
        for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
            text = textwrap.dedent(block["text"])
            if isinstance(yaml.safe_load(text), dict):
                (folder / "block.yaml").write_text(text, encoding="utf-8")
                found.append((path.relative_to(ROOT).as_posix(), read_yaml(folder / "block.yaml", "a recipe")))
    return found


def test_recipes_and_stages_on_pages_are_valid(tmp_path: Path) -> None:
    checked = sections(tmp_path)
    assert len(checked) > 8
    assert [(page, p) for page, content in checked if (p := problem(content))] == []


@pytest.mark.parametrize("text", ["sft: {kind: sft, data: {train: [{path: a}]}, epoch: 2}", "{model: {}, stages: {}}"])
def test_a_wrong_setting_on_a_page_is_noticed(text: str) -> None:
    assert problem(yaml.safe_load(text))
