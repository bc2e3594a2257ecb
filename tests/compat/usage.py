"""Our source's use of a package: imports, attributes and calls of imported names, subclasses.

It is read from the source itself, so a new import is checked without being listed anywhere.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .tree import Function, dotted

FOLDERS = ("align", "reward", "eval", "recipes")


@dataclass(frozen=True)
class Import:
    """`from module import name`, or `import module` with an empty name."""

    module: str
    name: str
    where: str

    def __str__(self) -> str:
        return f"from {self.module} import {self.name}" if self.name else f"import {self.module}"


@dataclass(frozen=True)
class Use:
    """An attribute, and a call if `call` is set, of an imported name. path: `.`-separated attributes, may be empty."""

    of: Import
    path: str
    where: str
    call: ast.Call | None = None


@dataclass(frozen=True)
class Subclass:
    """A class of ours below an imported one. node: ours; mixins: bases that are ours."""

    of: Import
    node: ast.ClassDef
    mixins: list[ast.ClassDef]
    where: str


@dataclass
class Usage:
    """imports: alternatives; one of each group has to exist, as in `try: import a; except ImportError: import b`."""

    imports: list[list[list[Import]]] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    subclasses: list[Subclass] = field(default_factory=list)
    text: str = ""


def usage(source: Path, package: str) -> Usage:
    """Uses of `package` in the Python files of `source`, a checkout."""
    found = Usage()
    for path in files(source, package):
        body = ast.parse(path.read_text(encoding="utf-8"))
        found.text += path.read_text(encoding="utf-8")
        _read(body, package, path.relative_to(source).as_posix(), found)
    return found


def files(source: Path, package: str) -> list[Path]:
    """Files that name the package, each once: `align` has links to the other folders."""
    paths = {path.resolve() for folder in FOLDERS for path in (source / folder).rglob("*.py")}
    return sorted(path for path in paths if package in path.read_text(encoding="utf-8"))


def _read(body: ast.Module, package: str, file: str, found: Usage) -> None:
    names: dict[str, Import] = {}
    optional: set[ast.AST] = set()
    for node in ast.walk(body):
        if isinstance(node, ast.Try) and any(_catches_imports(handler) for handler in node.handlers):
            branches = [node.body, *(handler.body for handler in node.handlers if _catches_imports(handler))]
            groups = [[one for each in branch for one in _imports(each, package, file)] for branch in branches]
            if all(groups):
                found.imports.append(groups)
                optional |= {inner for branch in branches for each in branch for inner in ast.walk(each)}
    for node in ast.walk(body):
        for each in _imports(node, package, file) if isinstance(node, ast.ImportFrom | ast.Import) else ():
            if node not in optional:
                found.imports.append([[each]])
                names[_alias(node, each)] = each
    parents = {child: node for node in ast.walk(body) for child in ast.iter_child_nodes(node)}
    classes = {node.name: node for node in ast.walk(body) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(body):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Name | ast.Attribute) and not isinstance(parents.get(node), ast.Attribute):
            name, _, path = dotted(node).partition(".")
            if name in names:
                parent = parents.get(node)
                call = parent if isinstance(parent, ast.Call) and parent.func is node else None
                found.uses.append(Use(names[name], path, where, call))
        if isinstance(node, ast.ClassDef):
            bases = [dotted(b.value if isinstance(b, ast.Subscript) else b) for b in node.bases]
            mixins = [classes[base] for base in bases if base in classes]
            found.subclasses += [Subclass(names[base], node, mixins, where) for base in bases if base in names]


def _imports(node: ast.AST, package: str, file: str) -> Iterator[Import]:
    where = f"{file}:{getattr(node, 'lineno', 0)}"
    match node:
        case ast.ImportFrom(module=str(module), level=0) if module.split(".")[0] == package:
            yield from (Import(module, alias.name, where) for alias in node.names)
        case ast.Import():
            yield from (Import(a.name, "", where) for a in node.names if a.name.split(".")[0] == package)


def _alias(node: ast.ImportFrom | ast.Import, one: Import) -> str:
    """The name that the import binds."""
    for alias in node.names:
        if alias.name in (one.name, one.module):
            return alias.asname or alias.name
    raise AssertionError(one)


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    return dotted(handler.type) in ("ImportError", "ModuleNotFoundError")


def methods(subclass: Subclass) -> dict[str, ast.AST]:
    """{name: definition} in our class and in bases of ours."""
    found: dict[str, ast.AST] = {}
    for owner in [*reversed(subclass.mixins), subclass.node]:
        for node in owner.body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    found[node.name] = node
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    found[name] = node
    return found


def is_function(node: ast.AST) -> bool:
    return isinstance(node, Function)
