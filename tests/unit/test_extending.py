"""docs/extending.md is followed literally, on a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^(?:New file `(?P<new>[^`]+)`"
    r"|In `(?P<file>[^`]+)`, (?P<how>before|after|instead of) the line `(?P<line>[^`]+)`):\n\n"
    r"```python\n(?P<code>.*?)```",
    re.MULTILINE | re.DOTALL,
)


def apply(page: str, root: Path) -> None:
    """Insert every code block of the page where the sentence before the block says."""
    for block in BLOCK.finditer(page):
        if block["new"]:
            path = root / block["new"]
            path.parent.mkdir(exist_ok=True)
            assert not path.exists()
            path.write_text(block["code"], encoding="utf-8")
            continue
        path = root / block["file"]
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        places = [number for number, line in enumerate(lines) if line.strip() == block["line"]]
        assert len(places) == 1, f"{block['file']} has {len(places)} lines `{block['line']}`"
        first = places[0] + (block["how"] == "after")
        last = places[0] + (block["how"] != "before")
        lines[first:last] = block["code"].splitlines(keepends=True)
        path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extended package, without symbolic links, so that `align/reward` is a folder of its own."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "align", root / "align", ignore=shutil.ignore_patterns("__pycache__"))
    apply(PAGE, root)
    return root


CHECKS = Path(__file__).with_name("extending_checks.py")


@pytest.mark.slow
def test_the_page_works(copy: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(CHECKS)], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "7 extensions work"


def test_the_table_counts_the_files() -> None:
    sections = {part.partition("\n")[0].strip(): part for part in PAGE.split("\n## ")[1:]}
    rows = re.findall(r"^\| \[([^\]]+)\]\(#[\w-]+\) \| (.+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == len(sections) == 7
    for name, count in rows:
        files = {b["new"] or b["file"] for b in BLOCK.finditer(sections[name[0].upper() + name[1:]])}
        folders = {str(Path(file).parent) for file in files if "models/mix" in file}
        wanted = f"{len(folders)} folder and {len(files) - 3} line" if folders else str(len(files))
        assert count == wanted, name


def test_every_block_of_code_is_applied() -> None:
    assert PAGE.count("```python") == len(BLOCK.findall(PAGE))


def test_a_line_that_moved_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("a = 1\n")
    with pytest.raises(AssertionError, match="has 0 lines `b = 2`"):
        apply("In `x.py`, after the line `b = 2`:\n\n```python\nc = 3\n```", tmp_path)
