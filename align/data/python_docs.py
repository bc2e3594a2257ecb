"""Training data from the documentation of Python's standard library, read from the running installation.

Python sources are parsed with `ast` and not imported, so no code runs. The modules of `COMPILED_MODULES`, at least
partly written in C, are imported for their docstrings; importing them has no side effects. The order of the rows is
deterministic. Their content depends on the Python version and, for a few compiled modules, on how Python was built.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from align.errors import UserError
from align.run.cache import cache_folder, hashed, read_json, write_atomically

Split = Literal["train", "held_out"]
View = Literal["text", "conversation", "prompts", "pairs"]

MIN_DOC_CHARS = 30
HELD_OUT_PERCENT = 13
"""Percentage of the top-level modules that is held out, in expectation."""

# Modules that are at least partly written in C, whose docstrings cannot be parsed from *.py files. Importing them has
# no side effects.
COMPILED_MODULES = (
    "array", "atexit", "binascii", "builtins", "cmath", "collections", "datetime", "decimal", "errno",
    "functools", "gc", "hashlib", "io", "itertools", "marshal", "math", "operator", "pickle", "random",
    "re", "select", "socket", "sqlite3", "struct", "sys", "threading", "time", "unicodedata", "weakref",
    "zlib",
)  # fmt: skip
# Applications, tests, jokes, generated tables, and modules of a single platform. `_texts` reads `pydoc_data` itself.
SKIPPED_MODULES = {
    "antigravity", "config", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "nt",
    "ntpath", "nturl2path", "pydoc_data", "site", "test", "this", "tkinter", "turtle", "turtledemo",
    "winreg", "winsound",
}  # fmt: skip
SKIPPED_FOLDERS = {"test", "tests", "__pycache__"}


@dataclass(frozen=True)
class DocEntry:
    """One documented name."""

    module: str
    """Importable module, for example `os.path` or `json.decoder`."""
    name: str
    """Qualified name, for example `textwrap.TextWrapper.fill`."""
    kind: Literal["function", "class", "method", "module", "topic"]
    signature: str
    """Argument names in parentheses; empty if unknown, too long, or with a private name."""
    doc: str
    """Cleaned documentation, not truncated."""

    @property
    def group(self) -> str:
        """Name of the top-level module; all entries of a group are in the same split."""
        return self.module.split(".")[0]


def split_of(group: str) -> Split:
    """Split of a group, which depends only on this string: the name of a top-level module, or the text of a topic."""
    digest = hashlib.sha256(group.encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT else "train"


# --- reading the installation -----------------------------------------------------------------------------


@lru_cache(maxsize=1)
def documented_names() -> tuple[DocEntry, ...]:
    """All documented public names: about 4,800 entries on Python 3.11.

    Parsing them takes about four seconds. The result is kept in the cache folder until the installation changes.

    Raises `UserError` if the installation has no *.py sources (a frozen Python).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {
        group: _sources_of(root, group)
        for group in sorted(sys.stdlib_module_names)
        if not group.startswith("_") and group not in SKIPPED_MODULES
    }
    file = cache_folder(None).with_name("python_docs") / f"{_identity(sources)}.json"
    kept = read_json(file)
    if kept is not None:
        return tuple(DocEntry(*fields) for fields in kept)
    entries = _read(root, sources)
    with suppress(OSError):  # without the file, the installation is parsed again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps([astuple(entry) for entry in entries]).encode())
    return entries


def _identity(sources: dict[str, list[Path]]) -> str:
    """Hash of the Python build, of the sizes and times of its sources, and of this module."""
    status = [(str(path), path.stat()) for paths in sources.values() for path in paths]
    files = [(path, found.st_size, found.st_mtime_ns) for path, found in status]
    return hashed([sys.version, list(sources), files, Path(__file__).read_text(encoding="utf-8")])


def _read(root: Path, sources: dict[str, list[Path]]) -> tuple[DocEntry, ...]:
    """The entries of all modules. sources: the files of each top-level module."""
    entries: dict[str, DocEntry] = {}
    for group, paths in sources.items():
        for path in paths:
            module = _module_name(root, path)
            for entry in _parsed_entries(module, path):
                entries.setdefault(entry.name, entry)
        if group in COMPILED_MODULES:
            for entry in _imported_entries(group):
                entries.setdefault(entry.name, entry)
    if len(entries) < 100:
        raise UserError(
            f"python_docs: {root} has too few *.py files of the standard library; use a Python with its sources."
        )
    return tuple(sorted(entries.values(), key=lambda entry: entry.module))  # stable: keeps the source order


def _sources_of(root: Path, group: str) -> list[Path]:
    if (root / f"{group}.py").is_file():
        return [root / f"{group}.py"]
    return [
        path
        for path in sorted((root / group).rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        and (path.name == "__init__.py" or not any(p.startswith("_") for p in path.relative_to(root).parts))
        and not re.search(r"windows|win32|macholib", str(path.relative_to(root)))
    ]


def _module_name(root: Path, path: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    # Python documents the functions of these two modules as os.path.
    return "os.path" if parts in (["posixpath"], ["genericpath"]) else ".".join(parts)


def _parsed_entries(module: str, path: Path) -> Iterator[DocEntry]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    yield from _entry(module, module, "module", "", ast.get_docstring(tree))
    yield from _walk(module, module, tree.body, inside_class=False)


def _walk(module: str, prefix: str, body: list[ast.stmt], *, inside_class: bool) -> Iterator[DocEntry]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):  # conditional definitions, for versions or platforms
            branches = [*node.body, *node.orelse, *(s for h in getattr(node, "handlers", []) for s in h.body)]
            yield from _walk(module, prefix, branches, inside_class=inside_class)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from _entry(module, name, "class", "", ast.get_docstring(node))
                yield from _walk(module, name, node.body, inside_class=True)
            else:
                kind = "method" if inside_class else "function"
                yield from _entry(module, name, kind, _parsed_signature(node.args), ast.get_docstring(node))


def _parsed_signature(args: ast.arguments) -> str:
    names = [a.arg for a in [*args.posonlyargs, *args.args]]
    if names[:1] in (["self"], ["cls"]):
        names.pop(0)
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [a.arg for a in args.kwonlyargs] + ([f"**{args.kwarg.arg}"] if args.kwarg else [])
    return _short_signature(names)


def _short_signature(names: list[str]) -> str:
    text = f"({', '.join(names)})"
    return text if len(text) <= 48 and not any(n.lstrip("*").startswith("_") for n in names) else ""


def _imported_entries(module: str) -> Iterator[DocEntry]:
    namespace = importlib.import_module(module)
    yield from _entry(module, module, "module", "", namespace.__doc__)
    for name, value in sorted(vars(namespace).items()):
        if module == "sys":  # a library may have replaced a hook; sys.__NAME__ is the original
            value = getattr(namespace, f"__{name}__", value)
        home = getattr(value, "__module__", None) or module
        # A name defined in another public module is documented there. A name defined in a private module is kept, such
        # as threading.get_ident, which is defined in _thread.
        if name.startswith("_") or (home != module and not home.startswith("_")):
            continue
        if inspect.isclass(value):
            yield from _entry(module, f"{module}.{name}", "class", "", value.__doc__)
            for member, method in sorted(vars(value).items()):
                if not member.startswith("_") and inspect.isroutine(method):
                    qualified = f"{module}.{name}.{member}"
                    yield from _entry(module, qualified, "method", _signature(method), inspect.getdoc(method))
        elif inspect.isroutine(value):
            yield from _entry(module, f"{module}.{name}", "function", _signature(value), value.__doc__)


def _signature(routine: Any) -> str:
    try:
        parameters = inspect.signature(routine).parameters.values()
    except (TypeError, ValueError):  # many C functions have no signature
        return ""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [stars.get(p.kind, "") + p.name for p in parameters if p.name not in ("self", "cls", "type")]
    return _short_signature(names)


def _entry(module: str, name: str, kind: Any, signature: str, doc: str | None) -> Iterator[DocEntry]:
    cleaned = clean_doc(doc or "", name.rsplit(".", 1)[-1])
    if len(cleaned) >= MIN_DOC_CHARS:
        yield DocEntry(module, name, kind, signature, cleaned)


# --- cleaning ---------------------------------------------------------------------------------------------


def clean_doc(doc: str, name: str) -> str:
    """`doc` without indentation and without leading lines that repeat the signature; prose has one line per
    paragraph."""
    lines = inspect.cleandoc(doc).splitlines()
    call = re.compile(rf"(?:\w+\.)*{re.escape(name)}\s*\(.*\)?(?:\s*->.*)?$")
    while lines and (not lines[0].strip() or call.match(lines[0])):
        # Of `name(x) -> y  Sentence.` and `name(x) -- sentence`, keep the sentence.
        rest = re.split(r"\s--\s|\)\s{2,}|->\s*\w+\s{2,}", lines[0], maxsplit=1)
        lines.pop(0)
        if len(rest) == 2 and len(rest[1].split()) > 3:
            lines.insert(0, rest[1].strip())
            break
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip())
    return "\n\n".join(filter(None, map(_reflow, paragraphs)))


def _reflow(paragraph: str) -> str:
    """Join the lines of a paragraph of prose; lists, tables and examples are unchanged."""
    lines = [line.rstrip() for line in paragraph.strip("\n").splitlines()]
    if any(re.match(r"\s|>>>|\.\.\.|[-*=+|#:]|\d+[.)]\s", line) for line in lines):
        return "\n".join(lines)
    return " ".join(lines)


def cut_at_sentence(text: str, limit: int) -> str:
    """As many whole sentences from the start of `text` as fit in `limit` characters; stops before the first example.

    Empty if the first sentence is longer than `limit`.
    """
    text = re.split(r"\n*^\s*(?:>>>|\.\. |:param|:type)", text, maxsplit=1, flags=re.MULTILINE)[0].strip()
    if len(text) <= limit:
        return text if not text.endswith(":") else text.rpartition("\n\n")[0].rstrip()
    ends = [m.end() for m in re.finditer(r"(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s|$)", text[: limit + 1])]
    ends = [end for end in ends if end <= limit]
    return text[: ends[-1]] if ends else ""


# --- views ------------------------------------------------------------------------------------------------

PHRASINGS = {
    "function": (
        "What does `{call}` do in Python?",
        "Explain the Python function `{call}`.",
        "What is `{call}` for in Python's standard library?",
        "How does Python's documentation describe `{call}`?",
    ),
    "method": (
        "What does the method `{call}` do in Python?",
        "Explain the Python method `{call}`.",
        "What is `{call}` for in Python's standard library?",
        "How does Python's documentation describe the method `{call}`?",
    ),
    "class": (
        "What is the class `{call}` in Python?",
        "Explain the Python class `{call}`.",
        "What is `{call}` for in Python's standard library?",
        "How does Python's documentation describe the class `{call}`?",
    ),
}


def question(entry: DocEntry) -> str:
    """Question about an entry. The phrasing depends on the entry's name only."""
    name = entry.name.removeprefix("builtins.")
    phrasings = PHRASINGS[entry.kind]
    number = int.from_bytes(hashlib.sha256(entry.name.encode()).digest()[:4], "big") % len(phrasings)
    return phrasings[number].format(call=name + entry.signature)


@lru_cache(maxsize=8)
def _answers(split: Split, max_answer_chars: int) -> tuple[tuple[DocEntry, str], ...]:
    """(entry, answer) pairs of a split. No answer occurs twice, so no training answer is in the held-out split."""
    seen: set[str] = set()
    kept: dict[Split, list[tuple[DocEntry, str]]] = {"train": [], "held_out": []}
    candidates = [e for e in documented_names() if e.kind in PHRASINGS]
    for side in ("train", "held_out"):  # an answer that occurs in both is kept in the training split
        for entry in candidates:
            if split_of(entry.group) != side:
                continue
            answer = cut_at_sentence(entry.doc, max_answer_chars)
            key = " ".join(answer.lower().split())
            if len(answer) >= MIN_DOC_CHARS and key not in seen:
                seen.add(key)
                kept[side].append((entry, answer))
    return tuple(kept[split])


def _neighbour(answers: tuple[tuple[DocEntry, str], ...], number: int) -> str:
    """Answer of the next entry in the same module, or of the next module if this is the module's only entry."""
    module = answers[number][0].module
    first, last = number, number + 1  # entries of a module are contiguous
    while first > 0 and answers[first - 1][0].module == module:
        first -= 1
    while last < len(answers) and answers[last][0].module == module:
        last += 1
    if last - first == 1:
        return answers[(number + 1) % len(answers)][1]
    return answers[first + (number + 1 - first) % (last - first)][1]


def _texts(split: Split) -> list[dict[str, Any]]:
    rows, seen = [], set()
    for side in ("train", "held_out"):
        for entry in documented_names():
            if split_of(entry.group) == side and entry.doc not in seen:
                seen.add(entry.doc)
                if side == split:
                    head = f"{entry.name}{entry.signature}".removeprefix("builtins.")
                    rows.append({"text": f"{head}\n\n{entry.doc}", "module": entry.module, "name": entry.name})
    from pydoc_data.topics import topics  # the language reference is large, and only this view needs it

    for name, text in sorted(topics.items()):
        # Topics are split by their text, because some have two names.
        if split_of(text) == split and text not in seen:
            seen.add(text)
            rows.append({"text": text.strip(), "module": "pydoc_data.topics", "name": name})
    return rows


def python_docs_rows(view: View, split: Split, max_answer_chars: int) -> list[dict[str, Any]]:
    """Rows of one view in a fixed order. Every row also has the columns `module` and `name`.

    text          {text}, not truncated; includes the topics of the language reference
    conversation  {messages}
    prompts       {prompt, reference}
    pairs         {prompt, chosen, rejected}; rejected is the documentation of a neighbouring entry
    """
    if view == "text":
        return _texts(split)
    answers = _answers(split, max_answer_chars)
    rows: list[dict[str, Any]] = []
    for number, (entry, answer) in enumerate(answers):
        user, reply = {"role": "user", "content": question(entry)}, {"role": "assistant", "content": answer}
        origin = {"module": entry.module, "name": entry.name}
        if view == "conversation":
            rows.append({"messages": [user, reply], **origin})
        elif view == "prompts":
            rows.append({"prompt": [user], "reference": answer, **origin})
        else:
            other = {"role": "assistant", "content": _neighbour(answers, number)}
            rows.append({"prompt": [user], "chosen": [reply], "rejected": [other], **origin})
    return rows
