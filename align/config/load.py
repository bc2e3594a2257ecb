"""Read YAML text into a validated `Recipe`. Error messages name the key or line, and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from align.config.evaluation import TASK_NAME
from align.config.paths import local_path
from align.config.recipe import RUN_NAME, Recipe
from align.config.section import renamed
from align.errors import UserError

SHIPPED = Path(__file__).resolve().parents[1] / "recipes"
YAML = (".yaml", ".yml")
"""Suffixes of recipe files."""
DEEPEST = 50
"""Maximum nesting of lists and sections, far below the recursion limits of YAML, pydantic and JSON."""
LONGEST_NUMBER = 40
"""Maximum digits of a whole number."""
MOST_VALUES = 100_000
"""Maximum values of a recipe. Nested aliases can expand ten lines to billions of values."""

_INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "merge"))
_IMPLICIT_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "merge")}


class _Refused(Exception):
    """Raised for YAML text that a recipe may not contain. The message does not name the file.

    line: 1-based line number, if known.
    """

    def __init__(self, sentence: str, line: int | None = None):
        super().__init__(sentence)
        self.line = line


def _too_deep(line: int | None = None) -> _Refused:
    return _Refused(f"lists and sections are nested more than {DEEPEST} deep; flatten them.", line)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 (5e-6 is a number; 1:30 and 2026-01-31 are text).

    Raises `_Refused` for duplicate keys, whole numbers with leading zeros, tags, circular aliases and deep nesting.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _IMPLICIT_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str):
        super().__init__(stream)
        self.open: list[str | None] = []
        """Anchors of the lists and sections around the current node; None for a list or section without an anchor."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.open:
                raise _Refused(
                    f"the alias '*{anchor}' is inside the section or list '&{anchor}' that it refers to; write the "
                    "values instead of the alias.",
                    line,
                )
            anchor = None
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(f"the YAML tag '{shown}' is not supported; write the value without it.", line)
        if len(self.open) > DEEPEST:
            raise _too_deep(line)
        self.open.append(anchor)
        node = super().compose_node(parent, index)
        self.open.pop()
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                continue  # the base class refuses lists as keys and merges `<<`
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise _Refused(f"the key '{key}' is written twice; remove one of the two.", line)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        line, digits = node.start_mark.line + 1, node.value.replace("_", "")
        if len(digits) > LONGEST_NUMBER:
            raise _Refused(
                f"a whole number has {len(digits)} digits; write one of at most {LONGEST_NUMBER} digits.", line
            )
        if re.match("[-+]?0[0-9]", digits):
            raise _Refused(
                f"'{node.value}' begins with 0, which YAML 1.1 reads as octal; write {int(digits)}, or quote it if it "
                "is text.",
                line,
            )
        return int(digits, 0)


_StrictLoader.add_constructor(_INT, _StrictLoader.construct_int)
_StrictLoader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0b[01][01_]*)$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes every text that `_StrictLoader` would read as a number."""


_StrictDumper.yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


def dump(values: Any) -> str:
    """YAML that `load_recipe` reads as the same values."""
    return yaml.dump(values, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def _parse(text: str) -> Any:
    """The value of a YAML text. Raises `_Refused` or yaml.YAMLError."""
    return _separate(yaml.load(text, Loader=_StrictLoader), count())


def parse_value(text: str, where: str) -> Any:
    """The value of a piece of YAML on the command line. Raises `UserError`, whose message begins with `where`."""
    try:
        return _parse(text)
    except _Refused as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError:
        raise UserError(f"{where}: the value is not valid YAML; correct it.") from None


def _separate(value: Any, counter: Iterator[int], depth: int = 0) -> Any:
    """Copy with every alias expanded, so that an override of one key does not change others that share the alias."""
    if next(counter) > MOST_VALUES:
        raise _Refused(f"more than {MOST_VALUES} values once its aliases are expanded; use fewer aliases.")
    if not isinstance(value, dict | list):
        return value
    if depth > DEEPEST:  # reached through a chain of aliases
        raise _too_deep()
    if isinstance(value, list):
        return [_separate(item, counter, depth + 1) for item in value]
    return {key: _separate(item, counter, depth + 1) for key, item in value.items()}


def resolve_recipe_path(recipe: str | Path) -> Path:
    """The path itself if it is a file, otherwise the shipped recipe of that name.

    Raises `UserError`, with the nearest name for a typo.
    """
    path = local_path(recipe)
    if path.is_file():
        return path
    shipped = SHIPPED / (path.name if path.suffix else f"{path.name}.yaml")
    may_be_shipped = len(path.parts) <= 2
    if may_be_shipped and shipped.is_file():
        return shipped
    if path.is_dir():
        raise UserError(f"{path}: it is a folder; pass a recipe's file, or the name of a shipped recipe.")
    names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    if "/" not in str(recipe) and path.suffix not in YAML:
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the shipped recipes are {', '.join(names)}."
        raise UserError(f"{path}: not a file and not a shipped recipe; {hint}")
    files = {name: f"{name}.yaml" for name in names if may_be_shipped}
    files |= {file.stem: file.name for file in path.parent.glob("*") if file.suffix in YAML}
    near = difflib.get_close_matches(path.stem, files, n=1)
    hint = f"did you mean '{path.with_name(files[near[0]])}'?" if near else "check the path."
    raise UserError(f"{path}: there is no such recipe file; {hint}")


def load_recipe(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply dotted overrides (`stages.dpo.beta=0.2`) and validate it.

    Raises `UserError` with one line per problem.
    """
    path = resolve_recipe_path(recipe)
    values = read_yaml(path, "a recipe; write a mapping with the keys name, model and stages")
    for override in overrides:
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _sentence(values, problem).splitlines()]
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems)) from None


def read_yaml(path: Path, wanted: str) -> dict[str, Any]:
    """The mapping of a YAML file. Raises `UserError` if it is not one. wanted: what it should be, and the fix."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not valid UTF-8; save the file as UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.") from None
    try:
        values = _parse(text)
    except _Refused as error:
        where = f"line {error.line}: " if error.line else ""
        raise UserError(f"{path}: {where}{error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{path}: {where}not valid YAML ({reason}); correct it.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not {wanted}.")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override '{override}': not of the form key=value; write, for example, stages.dpo.beta=0.2.")
    value = parse_value(text, f"override '{override}'")
    if dotted.count(".") > DEEPEST:
        raise UserError(f"override '{override}': {_too_deep()}")
    *parents, last = dotted.split(".")
    stages = values.get("stages")
    if parents[:1] == ["stages"] and len(parents) > 1 and isinstance(stages, dict) and parents[1] not in stages:
        raise UserError(
            f"override '{override}': the recipe has no stage '{parents[1]}'; use one of {', '.join(map(str, stages))}."
        )
    node: Any = values
    for depth, key in enumerate(parents):
        node = _child(node, key, override, ".".join(parents[:depth]))
    if isinstance(node, list):
        _child(node, last, override, ".".join(parents))
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise _single_value(override, ".".join(parents), last)


def _child(node: Any, key: str, override: str, where: str) -> Any:
    if isinstance(node, list):
        # str.isdecimal alone accepts digits of other scripts, and int() refuses more than 4300 digits.
        if key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < len(node):
            return node[int(key)]
        if not node:
            raise UserError(
                f"override '{override}': '{where}' is an empty list and has no entry '{key}'; override the whole list."
            )
        raise UserError(
            f"override '{override}': '{where}' is a list and has no entry '{key}'; write the index of an entry "
            f"({'0' if len(node) == 1 else f'0 to {len(node) - 1}'})."
        )
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    raise _single_value(override, where, key)


def _single_value(override: str, where: str, key: str) -> UserError:
    return UserError(f"override '{override}': '{where}' is a single value and has no key '{key}'; override '{where}'.")


def _sentence(values: dict[str, Any], problem: Any) -> str:
    """Error message for one pydantic problem: the dotted path, what is wrong, and a fix."""
    location = _written_path(values, problem["loc"])
    where = ".".join(location)
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        new, value = renamed(str(problem["loc"][-1]), problem["input"])
        if new != problem["loc"][-1] and new in _known_keys(problem["loc"][:-1]):
            setting = f"{new}: {value}" if isinstance(value, str) else new
            return f"the key '{where}' was renamed; write `{setting}`."
        return f"unknown key '{where}'; {_hint(problem['loc'])}"
    if kind == "missing":
        return f"the key '{where}' is missing; add it."
    if kind in ("union_tag_invalid", "literal_error"):
        expected = context.get("expected_tags") or context.get("expected")
        found = context["tag"] if "tag" in context else problem["input"]
        key = where + ".kind" if kind == "union_tag_invalid" else where
        return f"'{key}' is {_shown(found)}, but must be one of {expected}."
    if kind == "union_tag_not_found":
        kinds = [repr(kind) for kind in map(_kind_of, _models_at(problem["loc"])) if kind]
        return f"the key '{where}.kind' is missing; set it to one of {', '.join(kinds)}."
    if kind == "value_error":
        prefix = f"'{where}': " if where else ""
        return f"{prefix}{context['error']}."
    if kind == "invalid_key":
        return f"the key '{where}' is not text; put it in quotes."
    return f"'{where}' is {_shown(problem['input'])}, but {_wanted(problem)}."


_TYPES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be text",
    "list": "must be a list",
    "tuple": "must be a list",
    "dict": "must be a section with keys of its own",
    "model": "must be a section with keys of its own",
}
_PATTERNS = {
    RUN_NAME: "must begin with a letter or digit and contain only letters, digits, '.', '_' and '-'",
    TASK_NAME: "must begin with a lower-case letter or digit and contain only lower-case letters, digits, '_' and '-'",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _wanted(problem: Any) -> str:
    """Second half of the message about a value of the wrong type or size: "must be ..."."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        return f"must be {words} {int(bound) if bound == int(bound) else bound}"
    if kind in ("too_short", "too_long"):
        limit, words = ("min_length", "at least") if kind == "too_short" else ("max_length", "at most")
        entries = context[limit]
        return f"must have {words} {entries} {'entry' if entries == 1 else 'entries'}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        return _PATTERNS[context["pattern"]]
    wanted = _TYPES.get(kind.split("_")[0])
    if wanted is None:
        message: str = problem["msg"]
        return message[0].lower() + message[1:]
    if kind.startswith(("int", "float")) and isinstance(value, str) and re.fullmatch(r"[-+.\deE]*\d", value):
        wanted += ", written without quotes"
    elif kind.startswith("string") and isinstance(value, int | float):
        wanted += ", written in quotes"
    return wanted


def _shown(value: Any) -> str:
    """A value as a recipe writes it; lists and sections by their type only."""
    if isinstance(value, str):
        return f"'{value}'"
    if value is None or isinstance(value, bool):
        return {None: "empty", True: "true", False: "false"}[value]
    if isinstance(value, dict | list | tuple):
        kind = "section" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    return str(value)


def _written_path(values: Any, loc: tuple) -> list[str]:
    """Location of a pydantic error as the recipe has it, without the union tags that pydantic inserts."""
    path: list[str] = []
    node = values
    for i, key in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(node, dict) and (key in node or (last and not _is_tag(node, key))):
            node = node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
        elif not last or not isinstance(node, dict | list) or _is_tag(node, key):
            continue
        path.append(str(key))
    return path


def _is_tag(node: Any, key: Any) -> bool:
    """True if `key` is a union tag that pydantic inserted into the location; a recipe writes it as `kind`."""
    return isinstance(node, dict) and key not in node and node.get("kind", "file") == key


def _hint(loc: tuple) -> str:
    """Suggestion for an unknown key: a similar key, the same key in a subsection, or the list of known keys."""
    section, key = loc[:-1], str(loc[-1])
    known = _known_keys(section)
    within = {inner: set(_known_keys((*section, inner))) - set(known) for inner in known}
    deeper = [f"{inner}.{key}" for inner, keys in within.items() if key in keys]
    near = deeper or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known keys are {', '.join(known)}."


def _known_keys(loc: tuple) -> list[str]:
    """Keys that the section at `loc` accepts."""
    return sorted({name for model in _models_at(loc) for name in model.model_fields})


def _models_at(loc: tuple) -> list[type[BaseModel]]:
    """Section classes that are possible at `loc`, which includes pydantic's union tags."""
    models: list[type[BaseModel]] = [Recipe]
    names_an_entry = False  # then `key` is not a union tag: a stage of any kind may be called `sft`
    for key in loc:
        if names_an_entry:
            names_an_entry = False
            continue
        annotations = [m.model_fields[key].annotation for m in models if key in m.model_fields]
        found = [model for annotation in annotations for model in _models_in(annotation)]
        if found:
            names_an_entry = any(map(_holds_several, annotations))
        models = found or models
        models = [m for m in models if _kind_of(m) == key] or models
    return models


def _holds_several(annotation: Any) -> bool:
    """True if the annotation contains a list, tuple or dict: the next part of a location is then a key or index."""
    return get_origin(annotation) in (dict, list, tuple) or any(map(_holds_several, get_args(annotation)))


def _kind_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    arguments = getattr(field.annotation, "__args__", ()) if field else ()
    return arguments[0] if arguments else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]
