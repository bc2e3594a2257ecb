"""Shipped recipes load, overrides apply, and `align show` prints the same recipe."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import random
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from align import cli
from align.config import Recipe, load_recipe, resolve_recipe_path
from align.config.parts import Optimizer
from align.config.ppo import PpoStage
from align.config.rollout import Rollout
from align.config.section import Section
from align.config.stages import DpoStage
from align.errors import UserError

SHIPPED = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
MINIMAL = """
name: minimal
model: {kind: pretrained, path: ./model}
stages:
  dpo:
    kind: dpo
    data: {train: [{kind: file, path: pairs.jsonl}]}
    optimizer: {learning_rate: 5e-6}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def sections(value: object) -> list[BaseModel]:
    """Every section of a recipe, including the recipe itself."""
    if isinstance(value, BaseModel):
        return [value, *(s for name in type(value).model_fields for s in sections(getattr(value, name)))]
    if isinstance(value, dict):
        return [section for item in value.values() for section in sections(item)]
    if isinstance(value, list | tuple):
        return [section for item in value for section in sections(item)]
    return []


def test_there_are_shipped_recipes() -> None:
    assert {path.stem for path in SHIPPED} >= {"tiny", "quickstart"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_by_path_and_by_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.stages
    assert load_recipe(path.stem) == load_recipe(path.name) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("form", ["yaml", "json"])
def test_show_prints_the_same_recipe(path: Path, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["show", str(path), *(["--json"] if form == "json" else [])])
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed, encoding="utf-8")
    assert load_recipe(again) == load_recipe(path)
    if form == "json":
        assert Recipe.model_validate(json.loads(printed)) == load_recipe(path)
    cli.main(["show", str(again)])
    first = capsys.readouterr().out
    if form == "yaml":
        assert first == printed


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_section_is_frozen_and_refuses_unknown_keys(path: Path) -> None:
    found = sections(load_recipe(path))
    assert len(found) > 5
    for section in found:
        assert isinstance(section, Section)
        assert type(section).model_config["extra"] == "forbid"
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))


def test_a_copy_refuses_unknown_keys_too() -> None:
    """pydantic's own `model_copy` would accept them silently."""
    stage = load_recipe("tiny").stages["dpo"]
    assert stage.model_copy(update={"beta": 0.3}).beta == 0.3
    with pytest.raises(TypeError, match="DpoStage has no key betta"):
        stage.model_copy(update={"betta": 0.3})


def test_defaults_are_frozen_too() -> None:
    for default in (DpoStage, PpoStage):
        optimizer = default.model_fields["optimizer"].default
        with pytest.raises(ValidationError, match="frozen"):
            optimizer.learning_rate = 1.0
    assert Optimizer().learning_rate == 1e-5
    assert Rollout().engine == "vllm"


@pytest.mark.parametrize(
    ("text", "number"),
    [("5e-6", 5e-6), ("5E-6", 5e-6), ("1e-3", 0.001), ("2.5e-4", 2.5e-4), ("+1e-2", 0.01), (".5", 0.5)],
)
def test_exponents_read_as_numbers(minimal: Path, text: str, number: float) -> None:
    assert load_recipe(minimal).stages["dpo"].optimizer.learning_rate == 5e-6
    minimal.write_text(MINIMAL.replace("5e-6", text), encoding="utf-8")
    assert load_recipe(minimal).stages["dpo"].optimizer.learning_rate == number
    assert load_recipe(minimal, [f"stages.dpo.beta={text}"]).stages["dpo"].beta == number


def test_text_that_resembles_an_exponent_is_text(minimal: Path) -> None:
    assert load_recipe(minimal, ["description=e5", "name=e-6"]).name == "e-6"
    assert load_recipe(minimal, ["description='5e-6'"]).description == "5e-6"


@pytest.mark.parametrize("text", ["1:30", "1:30.5", "2026-01-31", "2026-13-45", "0b2", "0x_", "=", "1_e", "٣"])
def test_numbers_and_dates_of_yaml_1_1_only_are_text(minimal: Path, text: str) -> None:
    assert load_recipe(minimal, [f"description={text}"]).description == text


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("-0", 0), ("+12", 12), ("1_000", 1000), ("0x1F", 31), ("0b101", 5), ("9" * 9, 10**9 - 1)],
)
def test_whole_numbers(minimal: Path, text: str, number: int) -> None:
    assert load_recipe(minimal, [f"seed={text}"]).seed == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("1.5", 1.5), ("01.5", 1.5), ("2.", 2.0), ("1_0.5", 10.5), ("-1.5E+1", -15)],
)
def test_numbers(minimal: Path, text: str, number: float) -> None:
    found = load_recipe(minimal, [f"model.config={{rope_theta: {text}}}"]).model.config["rope_theta"]
    assert (found, type(found)) == (number, float)


@pytest.mark.parametrize(("text", "shown"), [("-.inf", "-inf"), (".nan", "nan"), ("{a: [1, {b: .inf}]}", "inf")])
def test_numbers_of_a_configuration_are_finite(minimal: Path, text: str, shown: str) -> None:
    with pytest.raises(UserError, match=f"is {shown}; set a finite number"):
        load_recipe(minimal, [f"model.config={{rope_theta: {text}}}"])


def test_an_override_of_an_aliased_section_changes_one_place(minimal: Path) -> None:
    minimal.write_text(
        """
name: aliases
model: {kind: pretrained, path: ./model}
stages:
  sft: &sft {kind: sft, data: &data {train: [{kind: file, path: rows.jsonl}]}, epochs: 3}
  more: {<<: *sft, init_from: sft}
  last: {kind: sft, data: *data}
""",
        encoding="utf-8",
    )
    changed = load_recipe(minimal, ["stages.more.data.max_length=16"]).stages
    assert (changed["sft"].epochs, changed["more"].epochs, changed["last"].epochs) == (3, 3, 1)
    assert [stage.data.max_length for stage in changed.values()] == [1024, 16, 1024]


ODD = [None, True, -1, 10**30, 1.5, math.nan, "", "x", "²", [], [None], [[]], {}, {"kind": "sft"}, {1: 2}, {"": {}}]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_any_odd_value_in_any_place_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    """Only `UserError` is raised, and a recipe that loads can be shown."""
    values, odd = yaml.safe_load(path.read_text(encoding="utf-8")), tmp_path / "odd.yaml"
    choose = random.Random(0)
    for place in choose.sample(places(values), 20):
        *parents, last = place
        changed = copy.deepcopy(values)
        holder = functools.reduce(lambda node, key: node[key], parents, changed)
        holder[last] = choose.choice(ODD)
        odd.write_text(yaml.safe_dump(changed), encoding="utf-8")
        try:
            cli.main(["show", str(odd)])
        except SystemExit as stopped:
            assert stopped.code == 2  # noqa: PT017
        with contextlib.suppress(UserError):
            load_recipe(path, [".".join(map(str, place)) + "=" + yaml.safe_dump(choose.choice(ODD)).strip(".\n")])


def places(value: object, above: tuple = ()) -> list[tuple]:
    """The path of keys to each value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*above, key), *places(item, (*above, key)))]


def test_overrides(minimal: Path) -> None:
    changed = load_recipe(
        minimal,
        [
            "seed=7",
            "stages.dpo.beta=0.2",
            "stages.dpo.lora.rank=4",  # a section that the recipe does not write
            "stages.dpo.data.train.0.limit=5",  # an entry of a list
            "stages.dpo.optimizer.betas=[0.8, 0.9]",
            "stages.dpo.max_steps=null",
            "model={kind: hot_start, experts: 8}",
        ],
    )
    dpo = changed.stages["dpo"]
    assert (changed.seed, dpo.beta, dpo.lora.rank, dpo.data.train[0].limit) == (7, 0.2, 4, 5)
    assert (dpo.optimizer.betas, dpo.optimizer.learning_rate, dpo.max_steps) == ((0.8, 0.9), 5e-6, None)
    assert (changed.model.kind, changed.model.experts) == ("hot_start", 8)
    assert load_recipe(minimal).stages["dpo"].beta == 0.1


def test_the_last_override_wins_and_equals_signs_are_kept(minimal: Path) -> None:
    assert load_recipe(minimal, ["seed=1", "seed=2"]).seed == 2
    assert load_recipe(minimal, ["description=a=b"]).description == "a=b"


def test_overrides_may_follow_flags(minimal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["show", str(minimal), "seed=3", "--json", "stages.dpo.beta=0.2"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["seed"], shown["stages"]["dpo"]["beta"]) == (3, 0.2)


def test_a_whole_number_is_a_number_but_2_0_is_not_a_whole_number(minimal: Path) -> None:
    assert load_recipe(minimal, ["stages.dpo.epochs=2"]).stages["dpo"].epochs == 2.0
    with pytest.raises(UserError, match=r"'seed' is 2\.0, but must be a whole number"):
        load_recipe(minimal, ["seed=2.0"])


def test_several_problems_are_reported_at_once(minimal: Path) -> None:
    with pytest.raises(UserError) as told:
        load_recipe(minimal, ["sede=1", "stages.dpo.beta=-1", "stages.dpo.lora.rank=0"])
    lines = str(told.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{minimal}: ") and line.endswith((".", "?")) for line in lines)


def test_a_recipe_in_the_working_directory_has_precedence(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(minimal.parent)
    minimal.rename(minimal.parent / "tiny.yaml")
    assert load_recipe("tiny.yaml").name == "minimal"
    assert resolve_recipe_path("quickstart").parent.name == "recipes"


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("tinny", "tinny: not a file and not a shipped recipe; did you mean 'tiny'?"),
        ("gsm8k_gpro", "gsm8k_gpro: not a file and not a shipped recipe; did you mean 'gsm8k_grpo'?"),
        ("tinny.yaml", "tinny.yaml: there is no such recipe file; did you mean 'tiny.yaml'?"),
        ("recipes/tinny.yaml", "recipes/tinny.yaml: there is no such recipe file; did you mean 'recipes/tiny.yaml'?"),
        ("own/my_law.yml", "own/my_law.yml: there is no such recipe file; did you mean 'own/my-law.yaml'?"),
        ("own/tinny", "own/tinny: there is no such recipe file; did you mean 'own/tiny.yaml'?"),
        ("a/b/tiny.yaml", "a/b/tiny.yaml: there is no such recipe file; check the path."),
        ("own", "own: it is a folder; pass a recipe's file, or the name of a shipped recipe."),
    ],
)
def test_a_typo_in_a_recipe_is_answered_by_the_nearest(
    named: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my-law.yaml").touch()
    (tmp_path / "own" / "my-law.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        load_recipe(named)
    assert str(told.value) == sentence


def test_recipes_survive_a_round_trip_of_their_defaults(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize("text", ["5e-6", "010", "1:30", "0x1f", "true", "null", "1_000", "- a", "é: b"])
def test_text_that_resembles_another_type_survives_show(minimal: Path, tmp_path: Path, capsys, text: str) -> None:
    recipe = load_recipe(minimal, [f"description={json.dumps(text)}"])
    assert recipe.description == text
    cli.main(["show", str(minimal), f"description={json.dumps(text)}"])
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(again) == recipe
