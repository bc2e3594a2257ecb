"""The pages as Markdown and as a site: links and anchors exist, and the navigation has every page."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SITE = runpy.run_path(str(ROOT / "docs" / "make_site.py"))
PAGES = SITE["markdown_files"]()
TOP = {"README.md", "docs/README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert SITE["broken_links"](page) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (
        "# One `x`\n[a](page.md#one-x) [b](page.md#two) [c](gone.md) ![d](gone.svg) `[e](code.md)` [f](https://x.org)\n"
    )
    page.write_text(text + "```\n[g](code.md)\n# Two\n```\n", encoding="utf-8")
    assert SITE["broken_links"](page) == ["page.md#two", "gone.md", "gone.svg"]


def test_the_navigation_has_every_page_once() -> None:
    sections = SITE["navigation"]((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    listed = [path for entries in sections.values() for path in entries.values()]
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES} - TOP
    assert sorted(listed) == sorted(pages), "docs/README.md lists every page once"


def test_pages_of_the_site(tmp_path: Path) -> None:
    """Links to a folder and to a file of code lead to pages that show them; code and other links stay."""
    root, build = tmp_path / "root", tmp_path / "build"
    (root / "docs" / "site").mkdir(parents=True)
    (root / "examples" / "one").mkdir(parents=True)
    (root / "README.md").write_text("# A\n[one](examples/one/) [b](docs/b.md#b)\n```\n[x](examples/one/)\n```\n")
    (root / "docs" / "b.md").write_text("# B\n[code](../examples/one/run.py) ![p](p.svg) [w](https://x.org/a.py)\n")
    (root / "docs" / "p.svg").write_text("<svg/>")
    (root / "examples" / "one" / "run.py").write_text("print(1)\n")
    SITE["stage"](root, build)
    text = {path.relative_to(build).as_posix(): path.read_text() for path in build.rglob("*") if path.is_file()}
    assert text["README.md"] == "# A\n[one](examples/one/README.md) [b](docs/b.md#b)\n```\n[x](examples/one/)\n```\n"
    assert text["docs/b.md"] == "# B\n[code](../examples/one/run.py.md) ![p](p.svg) [w](https://x.org/a.py)\n"
    assert text["docs/p.svg"] == "<svg/>"
    assert text["examples/one/README.md"] == "# one/\n\n* [run.py](run.py.md)\n"
    assert text["examples/one/run.py.md"] == "# run.py\n\n````python\nprint(1)\n````\n"


def test_problems_of_a_built_site_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x">1</a><a href="b.html#y">2</a><a href="c.html">3</a><a href="https://x.org">4</a>'
        '<script src="https://cdn.x.org/a.js"></script><img src="gone.svg">'
    )
    (tmp_path / "b.html").write_text('<h1 id="x">B</h1>')
    (tmp_path / "a.css").write_text("@font-face { src: url(//fonts.x.org/a) }")
    assert list(SITE["problems"](tmp_path)) == [
        "a.html: b.html#y has no such anchor",
        "a.html: c.html does not exist",
        "a.html loads https://cdn.x.org/a.js",
        "a.html: gone.svg does not exist",
        "a.css loads url(//fonts.x.org/a",
    ]


def mkdocs() -> str | None:
    """A Python that has MkDocs: that of `make docs`, or this one."""
    own = ROOT / ".venv-docs" / "bin" / "python"
    here = sys.executable if find_spec("material") and find_spec("mkdocs") else None
    return str(own) if own.exists() else here


@pytest.mark.slow
@pytest.mark.skipif(mkdocs() is None, reason="MkDocs is not installed: `make docs` installs it in .venv-docs")
def test_the_site_is_built_and_found_in_order(tmp_path: Path) -> None:
    """`make docs` itself checks the links of the built pages, and that nothing is loaded from a network."""
    python = mkdocs()
    assert python is not None
    environment = os.environ | {"ALIGN_SITE": str(tmp_path)}
    done = subprocess.run(
        [python, str(ROOT / "docs" / "make_site.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = re.match(r"(\d+) pages", done.stdout)
    assert count is not None
    assert int(count[1]) > len(PAGES)
    assert "__index" in (tmp_path / "site" / "search" / "search_index.js").read_text(encoding="utf-8")[:20]
