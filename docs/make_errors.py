"""Write docs/errors.md: run the cases of tests/unit/wrong_inputs and record the message of each.

    python docs/make_errors.py                       run every case (about a minute)
    python docs/make_errors.py --only hostfile seed  run the cases with one of these in their names; keep the others

New cases and cases in a merge conflict are always run, so `--only` alone adds new cases and resolves a conflict.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
PAGE = Path(__file__).parent / "errors.md"
INTRO = """# Errors

Each of these errors ends the command with exit status 2 and one message on standard error. A traceback is a bug; please
report it. Nothing is left half-written: files and model folders appear whole or not at all, and a stage that is refused
before its first step does not count as interrupted.

`…` stands for a part that varies. `python docs/make_errors.py` writes this page from the cases in
`tests/unit/wrong_inputs`; the last column names the case.
"""
HEAD = "| problem | message | test |\n|---|---|---|\n"


def import_cases() -> None:
    """Make the package `wrong_inputs` importable, as pytest does."""
    folder = str(Path(__file__).parents[1] / "tests" / "unit")
    if folder not in sys.path:
        sys.path.insert(0, folder)


def render(sentences: dict[str, str]) -> str:
    """The page, with the given sentence of each case."""
    import_cases()
    from wrong_inputs.cases import BY_SECTION

    blocks = [INTRO]
    for title, cases in BY_SECTION.items():
        rows = [f"| {cell(case.description)} | {code(sentences[case.name])} | `{case.name}` |\n" for case in cases]
        blocks.append(f"## {title}\n\n{HEAD}{''.join(rows)}")
    return "\n".join(blocks)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def code(text: str) -> str:
    """The sentence as Markdown code; a sentence with backticks needs two around it."""
    return cell(f"`` {text} ``" if "`" in text else f"`{text}`")


def read(page: str) -> dict[str, str | None]:
    """The sentence of each case on the page; None if the page has two (a merge conflict)."""
    sentences: dict[str, str | None] = {}
    for line in page.splitlines():
        cells = [part.strip() for part in line.strip().strip("|").split(" | ")]
        if len(cells) == 3 and cells[2].startswith("`"):
            name, said = cells[2].strip("`"), cells[1].strip("`").strip().replace("\\|", "|")
            sentences[name] = said if sentences.get(name, said) == said else None
    return sentences


def run(names: list[str]) -> dict[str, str]:
    """{name: what `align` says} of the named cases, without cases that fail."""
    from wrong_inputs.cases import ALL
    from wrong_inputs.here import save_checkpoint, working_folder

    sentences = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        tokenizer = save_checkpoint(model)
        for name in names:
            folder = Path(scratch).resolve() / name
            folder.mkdir()
            try:
                with working_folder(folder, model, tokenizer) as here:
                    sentences[name] = ALL[name].sentence(here)
            except Exception:
                print(f"{name}: failed; its old sentence is kept")
                traceback.print_exc()
    return sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = "run only the cases whose names contain one of these"
    parser.add_argument("--only", metavar="SUBSTRING", nargs="*", default=[""], help=words)
    only = parser.parse_args().only
    import_cases()
    from wrong_inputs.cases import ALL

    old = read(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    new = run([name for name in ALL if any(part in name for part in only) or old.get(name) is None])
    changed = {name: said for name, said in new.items() if old.get(name) != said}
    for name, said in changed.items():
        print(f"{name}: {said}")
    page = render({name: said for name, said in old.items() if said is not None} | new)
    PAGE.write_text(page, encoding="utf-8")
    print(f"{len(new)} cases run, {len(changed)} sentences changed")


if __name__ == "__main__":
    main()
