"""Compare our source's uses (`usage`, `contract`) with the files of one version (`tree`), and report missing names."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import contract
from .tree import Definition, Tree, bindings, dotted, kind, signature
from .usage import Import, Subclass, Usage, is_function, methods

PACKAGE = "vllm"


def problems(tree: Tree, used: Usage, source: Path) -> list[str]:
    """Incompatibilities with this version, one sentence each."""
    found = [*of_imports(tree, used), *of_uses(tree, used), *of_subclasses(tree, used)]
    found += [*of_contract(tree), *of_options(tree, source), *of_environment(tree, used), *of_routes(tree, used)]
    return list(dict.fromkeys(found))


# --- derived from our source -------------------------------------------------------------------------------


def of_imports(tree: Tree, used: Usage) -> Iterator[str]:
    for alternatives in used.imports:
        missing = [[one for one in group if not exists(tree, one)] for group in alternatives]
        if all(missing):
            for one in missing[0]:
                yield f"{one.where}: `{one}` fails{_moved(tree, one)}"


def exists(tree: Tree, one: Import) -> bool:
    return tree.module(one.module) is not None if not one.name else tree.find(one.module, one.name) is not None


def _moved(tree: Tree, one: Import) -> str:
    homes = [home for home in tree.homes(one.name, PACKAGE) if home != one.module] if one.name else []
    what = "the module is gone" if tree.module(one.module) is None else "the module has no such name"
    return f": {what}" + (f"; defined in {', '.join(homes[:3])}" if homes else "")


def of_uses(tree: Tree, used: Usage) -> Iterator[str]:
    for use in used.uses:
        target = tree.find(use.of.module, use.of.name) if use.of.name else None
        if target is None:
            continue  # a missing import is reported as such
        for name in filter(None, use.path.split(".")):
            step = attribute(tree, target, name)
            if step is None:
                yield f"{use.where}: {target} has no attribute '{name}'"
            target = step if isinstance(step, Definition) else None
            if target is None:
                break
        called = tree.signature(target) if use.call is not None and isinstance(target, Definition) else None
        if use.call is not None and (problem := of_call(called, *_arguments(use.call))):
            yield f"{use.where}: {target} does not take the arguments of our call: {problem}"


def attribute(tree: Tree, owner: Definition, name: str) -> Definition | bool | None:
    """The attribute's definition; True if it exists but shows no definition or cannot be judged; None if missing."""
    if isinstance(owner.node, ast.Module):
        return tree.find(owner.module, name)
    if isinstance(owner.node, ast.AnnAssign):  # a value: look into the class that annotates it
        annotated = tree.find(owner.module, dotted(owner.node.annotation))
        return attribute(tree, annotated, name) if annotated is not None else True
    if not isinstance(owner.node, ast.ClassDef):
        return True
    for node in tree.members(owner, name):
        return Definition(owner.module, f"{owner.name}.{name}", node) if is_function(node) else True
    return None


def of_call(taken: inspect.Signature | None, positional: int, keywords: list[str] | None) -> str | None:
    """The reason why a call does not fit. keywords: None with `*arguments` or `**arguments`, which are not judged."""
    if taken is None or keywords is None:
        return None
    try:
        taken.bind(*range(positional), **dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return None


def _arguments(call: ast.Call) -> tuple[int, list[str] | None]:
    starred = any(isinstance(each, ast.Starred) for each in call.args) or any(k.arg is None for k in call.keywords)
    return len(call.args), None if starred else [str(keyword.arg) for keyword in call.keywords]


def of_subclasses(tree: Tree, used: Usage) -> Iterator[str]:
    """Abstract methods are defined, as methods or properties like theirs; overriding methods take the same calls."""
    for subclass in used.subclasses:
        base = tree.find(subclass.of.module, subclass.of.name)
        if base is None or not isinstance(base.node, ast.ClassDef):
            continue
        ours = methods(subclass)
        for name, wanted in tree.abstract(base).items():
            if name not in ours:
                yield f"{subclass.where}: {subclass.node.name} does not define {base}.{name}, which is abstract"
            elif (got := kind(ours[name])) not in ("unknown", wanted):
                yield f"{subclass.where}: {base}.{name} is a {wanted}, but {subclass.node.name}.{name} is a {got}"
        yield from _of_overrides(tree, subclass, base, ours)


def _of_overrides(tree: Tree, subclass: Subclass, base: Definition, ours: dict[str, ast.AST]) -> Iterator[str]:
    for name, node in ours.items():
        theirs = next((each for each in tree.members(base, name) if is_function(each)), None)
        if theirs is None or not is_function(node) or name == "__init__" or kind(theirs) != kind(node):
            continue
        wanted, taken = signature(theirs), signature(node)  # type: ignore[arg-type]
        named = [p for p in wanted.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        positional = [p for p in named if p.kind != p.KEYWORD_ONLY]
        by_name = [p.name for p in named if p.kind == p.KEYWORD_ONLY]
        if problem := of_call(taken, len(positional), by_name):
            yield f"{subclass.where}: {subclass.node.name}.{name} overrides {base}.{name}{wanted}: {problem}"


# --- listed in the contract --------------------------------------------------------------------------------


def resolve(tree: Tree, path: str) -> Definition | None:
    """The definition at `module:name` or `module:Class.method`."""
    module, _, names = path.partition(":")
    owner, *rest = names.split(".")
    found = tree.find(module, owner)
    for name in rest:
        step = attribute(tree, found, name) if found is not None else None
        found = step if isinstance(step, Definition) else None
    return found


def of_contract(tree: Tree) -> Iterator[str]:
    for path, arguments in contract.CALLS:
        found = resolve(tree, path)
        if found is None:
            yield f"{path} is gone{_homes(tree, path)}"
        elif problem := of_call(tree.signature(found), 0, list(arguments)):
            yield f"{path} does not take {', '.join(arguments) or 'no arguments'}: {problem}"
    for path, names in contract.ATTRIBUTES:
        owner = resolve(tree, path)
        if owner is None:
            yield f"{path} is gone{_homes(tree, path)}"
            continue
        for name in names.split():
            if attribute(tree, owner, name) is None:
                yield f"{path} has no attribute '{name}'"
    for path, text in contract.READ:
        found = resolve(tree, path)
        if found is None:
            yield f"{path} is gone{_homes(tree, path)}"
        elif text not in ast.unparse(found.node):
            yield f"{path} no longer contains '{text}'"


def _homes(tree: Tree, path: str) -> str:
    module, _, names = path.partition(":")
    homes = [home for home in tree.homes(names.split(".")[0], PACKAGE) if home != module]
    return f"; {names.split('.')[0]} is defined in {', '.join(homes[:3])}" if homes else ""


def of_options(tree: Tree, source: Path) -> Iterator[str]:
    for file, functions, owners in contract.OPTIONS:
        body = ast.parse((source / file).read_text(encoding="utf-8"))
        known = [found for found in (resolve(tree, owner) for owner in owners) if found is not None]
        for function in functions.split():
            for key in sorted(_keys(body, function) - contract.OTHER_KEYS):
                if not any(attribute(tree, owner, key) for owner in known):
                    yield f"{file}: {function} passes '{key}', which none of {', '.join(owners)} has"


def _keys(body: ast.Module, function: str) -> set[str]:
    """Constant keys of dictionaries, and of assignments `options["key"] = ...`, in a function."""
    found: set[str] = set()
    for owner in bindings(body, function):
        for node in ast.walk(owner):
            match node:
                case ast.Dict(keys=keys):
                    found |= {key.value for key in keys if isinstance(key, ast.Constant)}
                case ast.Assign(targets=[ast.Subscript(value=ast.Name(id="options"), slice=ast.Constant(value=key))]):
                    found.add(key)
    return found


def of_environment(tree: Tree, used: Usage) -> Iterator[str]:
    known = (tree.root / contract.ENVIRONMENT).read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r'"(VLLM_[A-Z0-9_]+)"', used.text))):
        if f'"{name}"' not in known:
            yield f"the environment variable {name} is not in {contract.ENVIRONMENT}"


def of_routes(tree: Tree, used: Usage) -> Iterator[str]:
    """HTTP routes that `align.rollout` calls."""
    folder = tree.root / contract.SERVERS
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
    offered = set(re.findall(r'router\.(?:get|post)\(\s*"(/[a-z0-9_/]+)"', text))
    for route in sorted(set(re.findall(r'"(?:GET|POST)", f?"(/[a-z0-9_/]+)', used.text)) - offered):
        yield f"no server has the route {route}"


def describe(used: Usage) -> dict[str, Any]:
    """Counts for the report."""
    return {
        "imports": len(used.imports),
        "calls and attributes": len(used.uses),
        "subclasses": len(used.subclasses),
        "listed contracts": len(contract.CALLS) + len(contract.ATTRIBUTES) + len(contract.READ),
    }
