"""An unpacked package, read as text: definitions of names, attributes of classes, arguments of functions.

Nothing is imported, so the CUDA build of a package can be read on a machine without a GPU and without its dependencies.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """Definition of a name. node: a module, class, function, or the statement that sets a value."""

    module: str
    name: str
    node: ast.AST

    def __str__(self) -> str:
        return f"{self.module}:{self.name}" if self.name else self.module


class Tree:
    """The Python files below `root`, which contains the package's folder."""

    def __init__(self, root: Path):
        self.root = root

    @cache  # noqa: B019 (a tree lives as long as the program)
    def module(self, name: str) -> ast.Module | None:
        path = self.path(name)
        return ast.parse(path.read_text(encoding="utf-8")) if path is not None else None

    def path(self, module: str) -> Path | None:
        place = self.root.joinpath(*module.split("."))
        return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)

    def find(self, module: str, name: str) -> Definition | None:
        """The definition that `from module import name` imports."""
        return self._find(module, name, frozenset())

    def _find(self, module: str, name: str, seen: frozenset[tuple[str, str]]) -> Definition | None:
        body = self.module(module)
        if body is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        for node in bindings(body, name):
            match node:
                case ast.ImportFrom():
                    source = self.absolute(module, node)
                    names = {alias.asname or alias.name: alias.name for alias in node.names}
                    original = names.get(name, name)  # otherwise `*`
                    if found := self._find(source, original, seen):
                        return found
                case ast.Assign(value=ast.Name(id=other)) if other != name:
                    return self._find(module, other, seen) or Definition(module, name, node)
                case ast.Import():
                    continue
                case _:
                    return Definition(module, name, node)
        if (submodule := self.module(f"{module}.{name}")) is not None:
            return Definition(f"{module}.{name}", "", submodule)
        return self._find_lazy(module, body, name, seen)

    def _find_lazy(self, module: str, body: ast.Module, name: str, seen: frozenset) -> Definition | None:
        """A name that the module's `__getattr__` imports, listed as {name: "module:name"}."""
        for node in ast.walk(body):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    match key, value:
                        case ast.Constant(value=key_name), ast.Constant(value=str(target)) if (
                            key_name == name and ":" in target
                        ):
                            source, _, original = target.partition(":")
                            source = module + source if source.startswith(".") else source
                            return self._find(source, original, seen)
        return None

    def absolute(self, module: str, node: ast.ImportFrom) -> str:
        """Full name of the module that an import statement in `module` reads."""
        if not node.level:
            return node.module or ""
        path = self.path(module)
        packages = module.split(".") if path is not None and path.name == "__init__.py" else module.split(".")[:-1]
        kept = packages[: len(packages) - node.level + 1]
        return ".".join([*kept, *([node.module] if node.module else [])])

    def homes(self, name: str, package: str) -> list[str]:
        """Modules that define `name`, for a hint where it has moved."""
        found = []
        for path in sorted((self.root / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if f"def {name}(" in text or f"class {name}(" in text or f"class {name}:" in text:
                found.append(".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__"))
        return found

    # --- classes -----------------------------------------------------------------------------------------------

    def bases(self, owner: Definition) -> list[Definition]:
        """The class and its bases in this package, nearest first. Bases of other packages are omitted."""
        assert isinstance(owner.node, ast.ClassDef)
        found = [owner]
        for base in owner.node.bases:
            name = dotted(base.value if isinstance(base, ast.Subscript) else base)
            parent = self.find(owner.module, name) if name and "." not in name else None
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                found += [each for each in self.bases(parent) if each not in found]
        return found

    def members(self, owner: Definition, name: str) -> Iterator[ast.AST]:
        """Definitions of an attribute, the nearest class's first: methods, class variables, `self.name = ...`."""
        for each in self.bases(owner):
            yield from bindings(each.node, name)
            for node in ast.walk(each.node):
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                if isinstance(node, ast.Assign | ast.AnnAssign) and any(dotted(t) == f"self.{name}" for t in targets):
                    yield node

    def abstract(self, owner: Definition) -> dict[str, str]:
        """{name: kind} of the methods that a subclass must define."""
        found: dict[str, str] = {}
        for each in reversed(self.bases(owner)):
            for node in ast.iter_child_nodes(each.node):
                if isinstance(node, Function):
                    if "abstractmethod" in decorators(node):
                        found[node.name] = kind(node)
                    else:
                        found.pop(node.name, None)
        return found

    # --- signatures --------------------------------------------------------------------------------------------

    def signature(self, found: Definition) -> inspect.Signature | None:
        """Arguments of a call of a function or class; None if the files do not show them."""
        if isinstance(found.node, Function):
            return signature(found.node)
        if not isinstance(found.node, ast.ClassDef):
            return None
        for node in self.members(found, "__init__"):
            if isinstance(node, Function):
                return signature(node, bound=True)
        return self._fields(found)

    def _fields(self, owner: Definition) -> inspect.Signature | None:
        """Arguments of a dataclass, msgspec structure or typed dictionary."""
        fields: dict[str, inspect.Parameter] = {}
        classes = [each for each in reversed(self.bases(owner)) if isinstance(each.node, ast.ClassDef)]
        optional = any(dotted(base) == "TypedDict" for each in classes for base in each.node.bases)
        for each in classes:
            for node in each.node.body:
                match node:
                    case ast.AnnAssign(target=ast.Name(id=name)) if "ClassVar" not in ast.unparse(node.annotation):
                        default = None if node.value is not None or optional else inspect.Parameter.empty
                        only = optional or "kw_only=True" in (ast.unparse(node.value) if node.value else "")
                        if only and node.value is not None and "default" not in ast.unparse(node.value):
                            default = inspect.Parameter.empty
                        way = inspect.Parameter.KEYWORD_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
                        fields[name] = inspect.Parameter(name, way, default=default)
        if not fields:
            return None
        required_first = sorted(fields.values(), key=lambda p: (p.kind, p.default is not inspect.Parameter.empty))
        return inspect.Signature(required_first)


def bindings(body: ast.AST, name: str) -> Iterator[ast.AST]:
    """Statements that bind `name` in a module or class, also inside `if`, `try` and `with`."""
    for node in ast.iter_child_nodes(body):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if node.name == name:
                    yield node
            case ast.ImportFrom() | ast.Import():
                if any((alias.asname or alias.name.partition(".")[0]) in (name, "*") for alias in node.names):
                    yield node
            case ast.Assign(targets=targets):
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    yield node
            case ast.AnnAssign(target=ast.Name(id=target)):
                if target == name:
                    yield node
            case ast.If() | ast.Try() | ast.With() | ast.ExceptHandler():
                yield from bindings(node, name)


def signature(node: Function, *, bound: bool | None = None) -> inspect.Signature:
    """Signature of a `def`. bound: leave out `self`; by default for methods that have it."""
    a, ways = node.args, inspect.Parameter
    plain = [*a.posonlyargs, *a.args]
    if bound is None:
        bound = bool(plain) and plain[0].arg in ("self", "cls")
    without = len(plain) - len(a.defaults)
    made = []
    for index, argument in enumerate(plain):
        way = ways.POSITIONAL_ONLY if index < len(a.posonlyargs) else ways.POSITIONAL_OR_KEYWORD
        made.append(ways(argument.arg, way, default=ways.empty if index < without else None))
    made = made[1:] if bound else made
    if a.vararg:
        made.append(ways(a.vararg.arg, ways.VAR_POSITIONAL))
    for argument, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        made.append(ways(argument.arg, ways.KEYWORD_ONLY, default=ways.empty if default is None else None))
    if a.kwarg:
        made.append(ways(a.kwarg.arg, ways.VAR_KEYWORD))
    return inspect.Signature(made)


def decorators(node: Any) -> list[str]:
    """Names of a definition's decorators, without their packages and arguments."""
    return [
        dotted(each.func if isinstance(each, ast.Call) else each).rpartition(".")[2] for each in node.decorator_list
    ]


def kind(node: ast.AST) -> str:
    """property or method; a value that is computed is `unknown`."""
    if not isinstance(node, Function):
        return "unknown"
    return "property" if {"property", "cached_property"} & set(decorators(node)) else "method"


def dotted(node: ast.AST | None) -> str:
    """`a.b.c` for a name or an attribute of one; empty for other expressions."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            owner = dotted(value)
            return f"{owner}.{attr}" if owner else ""
    return ""
