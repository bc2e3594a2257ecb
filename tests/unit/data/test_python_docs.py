"""The source `python_docs`: its text, and disjoint splits."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections import Counter

import pytest

from align.data import python_docs
from align.data.python_docs import DocEntry, clean_doc, cut_at_sentence, python_docs_rows


def by_name(view, split="train", limit=400):
    return {row["name"]: row for row in python_docs_rows(view, split, limit)}


def test_known_documentation():
    rows = {**by_name("prompts"), **by_name("prompts", "held_out")}
    assert rows["builtins.len"]["reference"] == "Return the number of items in a container."
    assert "`len(obj)`" in rows["builtins.len"]["prompt"][0]["content"]
    assert rows["textwrap.dedent"]["reference"].startswith(
        "Remove any common leading whitespace from every line in `text`."
    )
    assert "`textwrap.TextWrapper.fill(text)`" in rows["textwrap.TextWrapper.fill"]["prompt"][0]["content"]
    assert rows["os.path.commonprefix"]["module"] == "os.path"


@pytest.mark.parametrize("limit", [80, 400])
def test_no_held_out_answer_is_in_training(limit):
    train, held_out = by_name("conversation", "train", limit), by_name("conversation", "held_out", limit)
    assert len(train) > 2000
    assert len(held_out) > 200
    modules = [{row["module"].split(".")[0] for row in rows.values()} for rows in (train, held_out)]
    assert not modules[0] & modules[1]
    assert 0.10 < len(modules[1]) / len(modules[0] | modules[1]) < 0.20
    for turn in (0, 1):
        contents = [row["messages"][turn]["content"] for rows in (train, held_out) for row in rows.values()]
        assert len(contents) == len(set(contents))
    assert all(python_docs.MIN_DOC_CHARS <= len(row["messages"][1]["content"]) <= limit for row in train.values())
    texts = [{row["text"].split("\n\n", 1)[-1] for row in by_name("text", s).values()} for s in ("train", "held_out")]
    assert not texts[0] & texts[1]


def test_the_split_of_a_module_is_its_hash():
    for module in ("textwrap", "shlex", "email"):
        percent = int(hashlib.sha256(module.encode()).hexdigest()[:8], 16) % 100
        assert python_docs.split_of(module) == ("held_out" if percent < 13 else "train")


def test_rejected_is_documentation_of_a_neighbour():
    rows = python_docs_rows("pairs", "train", 400)
    owner = {row["chosen"][0]["content"]: row["module"] for row in rows}
    size = Counter(row["module"] for row in rows)
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        if size[row["module"]] > 1:
            assert owner[rejected] == row["module"]
    assert sum(n for n in size.values() if n > 1) > 0.95 * len(rows)


def test_every_phrasing_is_used():
    starts = Counter(row["prompt"][0]["content"].split("`")[0] for row in by_name("prompts").values())
    assert starts["Explain the Python function "] > 150
    assert len(starts) == 10  # 3 kinds with 4 phrasings each; all kinds share one phrasing


def test_cleaning():
    doc = "max(iterable, *[, key=func]) -> value\nmax(a, b) -> value\n\nWith one argument,\nreturn the biggest."
    assert clean_doc(doc, "max") == "With one argument, return the biggest."
    assert clean_doc("f(x)", "f") == ""
    assert clean_doc("stat(path) -- return the status of it", "stat") == "return the status of it"
    assert clean_doc("Items:\n\n- one\n- two", "f") == "Items:\n\n- one\n- two"
    assert cut_at_sentence("One. Two is longer. Three", 12) == "One."
    assert cut_at_sentence("One. Two.", 9) == "One. Two."
    assert cut_at_sentence("No end before the limit here.", 10) == ""
    assert cut_at_sentence("Adds.\n\n>>> add(1)\n2", 99) == "Adds."
    assert cut_at_sentence("Takes e.g. a list. More follows here.", 20) == "Takes e.g. a list."


def test_the_installation_is_parsed_again_only_if_it_changes(monkeypatch, tmp_path):
    module = tmp_path / "lib" / "textwrap.py"
    module.parent.mkdir()
    parsed: list[str] = []
    parse = python_docs._parsed_entries
    monkeypatch.setattr(python_docs, "_parsed_entries", lambda *named: parsed.append(named[0]) or parse(*named))
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"textwrap"}))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(module.parent)})
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))

    def write(count: int) -> None:
        """Write a module with `count` documented functions."""
        text = [f'def f{n}(a):\n    """The documentation of function number {n}."""\n' for n in range(count)]
        module.write_text("".join(text))

    def read() -> tuple[int, int]:
        """(documented names, modules that were parsed)."""
        python_docs.documented_names.cache_clear()
        parsed.clear()
        names = python_docs.documented_names()
        assert names[0] == DocEntry(
            "textwrap", "textwrap.f0", "function", "(a)", "The documentation of function number 0."
        )
        return len(names), len(parsed)

    write(120)
    assert [read(), read()] == [(120, 1), (120, 0)]
    write(121)
    assert [read(), read()] == [(121, 1), (121, 0)]
    for file in (tmp_path / "cache" / "python_docs").iterdir():
        file.write_text("[[", encoding="utf-8")
    assert read() == (121, 1)
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").write_text("not a folder")
    assert read() == (121, 1)
    python_docs.documented_names.cache_clear()
