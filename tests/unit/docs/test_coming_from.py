"""Every setting that docs/coming_from.md names exists, here and in the installed TRL."""

from __future__ import annotations

import ast
import importlib.util
import re
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from align.config import stages
from align.config.recipe import Recipe

PAGE = (Path(__file__).parents[3] / "docs" / "coming_from.md").read_text(encoding="utf-8")
KINDS = {
    get_args(member.model_fields["kind"].annotation)[0]: member
    for member in get_args(get_args(stages.Stage)[0])
    if issubclass(member, BaseModel)
}
ROWS = [
    (section.partition("\n")[0], *(cell.strip() for cell in line.strip("|").split(" | ")[:2]))
    for section in PAGE.split("\n## ")[1:]
    for line in section.splitlines()
    if line.startswith("| ") and not line.startswith("| " + section.partition("\n")[0])
]


def classes(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value of this type may have, in lists and unions too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, dict):
        return [found for argument in get_args(annotation) for found in classes(argument)]
    return []


def types_of(path: str) -> list[Any]:
    """The types of the setting with this path; none if it does not exist."""
    first, *rest = path.split(".")
    if first == "STAGE":
        owners: list[type[BaseModel]] = [stages.SftStage]
    elif first in KINDS:
        owners = [KINDS[first]]
    else:
        owners, rest = [Recipe], [first, *rest]
    if not rest:
        return list(owners)
    found = []
    for number, key in enumerate(rest):
        fields = [owner.model_fields[key] for owner in owners if key in owner.model_fields]
        if number == len(rest) - 1:
            found = [field.rebuild_annotation() for field in fields]
        owners = [section for field in fields for section in classes(field.annotation)]
    return found


def problem(words: str) -> str | None:
    """Problem of `path` or `path: value` in the second column; None if it is valid."""
    path, colon, value = words.partition(": ")
    found = types_of(path)
    if not found:
        return f"{path} is not a setting"
    for annotation in found if colon else []:
        try:
            TypeAdapter(annotation).validate_python(yaml.safe_load(value))
        except ValidationError:
            return f"{value} is not a value of {path}"
    return None


def test_every_setting_of_ours_exists() -> None:
    names = [name for _, _, ours in ROWS for name in re.findall(r"`([^`]+)`", ours)]
    assert len(names) > 150
    assert [p for name in names if (p := problem(name))] == []


@pytest.mark.parametrize("words", ["ppo.kl.coeff", "STAGE.beta", "dpo.loss_type: sigmoids", "optimizer.betas"])
def test_a_name_that_does_not_exist_is_noticed(words: str) -> None:
    assert problem(words)


def fields(module: str, name: str) -> set[str]:
    """The annotated fields of a class in a module's source, which is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (owner,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.target.id for node in owner.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_every_setting_of_trl_exists() -> None:
    known = fields("transformers.training_args", "TrainingArguments") | fields("peft.tuners.lora.config", "LoraConfig")
    for kind, name in (("sft", "SFT"), ("dpo", "DPO"), ("kto", "KTO"), ("grpo", "GRPO"), ("reward", "Reward")):
        known |= fields(f"trl.trainer.{kind}_config", f"{name}Config")
    known |= {"LoraConfig", "reward_funcs", "reward_weights"}
    theirs = [cell for section, cell, _ in ROWS if section == "TRL"]
    values = {"grpo", "dapo", "dr_grpo", "cispo"}  # of loss_type
    names = {name for cell in theirs for name in re.findall(r"`([^`]+)`", cell)} - values
    assert len(names) > 60
    assert sorted(names - known) == []
