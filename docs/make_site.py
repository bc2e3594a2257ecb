"""Build the documentation as a site in build/site: `make docs`.

Needs requirements/docs.lock, and no other part of align. A page has the same relative links in the repository and on
the site. A file of code that a page links to, or a folder without README.md, becomes a page that shows it.

The build fails on a warning of MkDocs, on a link to a missing file or anchor, on a page that loads anything from the
network, and on a page whose headings, lists, tables or code blocks differ between MkDocs and a CommonMark parser, which
renders pages as GitHub does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
OUT = Path(os.environ.get("ALIGN_SITE", ROOT / "build"))
BUILD, SITE = OUT / "docs", OUT / "site"
MAP = ROOT / "docs" / "README.md"
CONFIG = ROOT / "docs" / "site" / "mkdocs.yml"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "sh", ".sbatch": "sh", ".jsonl": "json"}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCED = re.compile(r"^(?P<fence> *```).*?^\s*```$", re.MULTILINE | re.DOTALL)


def markdown_files(root: Path = ROOT) -> list[Path]:
    """The pages: Markdown files at the top and in docs/, examples/ and recipes/."""
    below = (path for folder in ("docs", "examples", "recipes") for path in (root / folder).rglob("*.md"))
    return sorted([*root.glob("*.md"), *below])


# --- links ---------------------------------------------------------------------------------------------------


def without_code(page: str) -> str:
    """The page without fenced blocks and code spans, whose brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", page))


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a Markdown file whose file or anchor does not exist."""
    found = []
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


# --- the pages of the site -----------------------------------------------------------------------------------


def stage(root: Path = ROOT, build: Path = BUILD) -> list[Path]:
    """Copy the pages and what they link to into `build`; return the paths of the pages, relative to `root`."""
    shutil.rmtree(build, ignore_errors=True)
    pages = {path.relative_to(root) for path in markdown_files(root)}
    waiting = sorted(pages)
    for path in waiting:  # grows: the page of a folder links to its files
        source = root / path
        if path.suffix == ".md" and source.is_file():
            text = source.read_text(encoding="utf-8")
        else:
            text = listing(source) if source.is_dir() else shown(source)
        linked: list[Path] = []
        write(build / page_of(root, path), rewrite(text, root, path, linked))
        for target in linked:
            if target.suffix in (".svg", ".png", ".gif"):
                write(build / target, (root / target).read_bytes())
            elif target not in pages:
                pages.add(target)
                waiting.append(target)
    for asset in (root / "docs" / "site").glob("*.[cj]s*"):
        write(build / asset.relative_to(root), asset.read_bytes())
    return waiting


def navigation(page: str) -> dict[str, dict[str, str]]:
    """{section: {title: path from the top}} of the sections and lists of docs/README.md."""
    found: dict[str, dict[str, str]] = {}
    for line in page.splitlines():
        if line.startswith("## "):
            section = found.setdefault(line[3:], {})
        elif entry := re.match(r"\* \[(.+?)\]\((\S+?)\)", line):
            section[entry[1]] = Path(os.path.normpath(Path("docs") / entry[2])).as_posix()
    return found


def configuration(page: str) -> str:
    """build/mkdocs.yml: docs/site/mkdocs.yml with the navigation of docs/README.md."""
    lines = [f"INHERIT: {json.dumps(os.path.relpath(CONFIG, OUT))}", "nav:", "  - Home: README.md"]
    for section, entries in navigation(page).items():
        lines.append(f"  - {json.dumps(section)}:")
        lines += [f"      - {json.dumps(title)}: {json.dumps(path)}" for title, path in entries.items()]
        if section == "Start":
            lines.append("      - All pages by task: docs/README.md")
    return "\n".join(lines) + "\n"


def page_of(root: Path, path: Path) -> Path:
    """Markdown file that shows a page, a file of code or a folder."""
    if (root / path).is_dir():
        return path / "README.md"
    return path if path.suffix == ".md" else path.with_name(f"{path.name}.md")


def rewrite(text: str, root: Path, path: Path, linked: list[Path]) -> str:
    """Let links to folders and to files of code lead to their pages; `linked` gets the paths of all targets."""
    home = path if (root / path).is_dir() else path.parent

    def new(match: re.Match[str]) -> str:
        link = match.group(0)
        if "://" in link or link.startswith("#"):
            return link
        name, mark, anchor = link.partition("#")
        target = Path(os.path.normpath(home / name))
        if not (root / target).exists():
            return link
        if (root / target / "README.md").is_file():
            target = target / "README.md"
        linked.append(target)
        if target.suffix in (".svg", ".png", ".gif"):
            return link
        return Path(os.path.relpath(page_of(root, target), home)).as_posix() + mark + anchor

    return outside_code(lambda part: LINK.sub(new, part), text)


def outside_code(change: Callable[[str], str], text: str) -> str:
    """Apply `change` to the text between fenced blocks."""
    parts, end = [], 0
    for block in FENCED.finditer(text):
        parts += [change(text[end : block.start()]), block.group(0)]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def shown(source: Path) -> str:
    """Page of a file of code."""
    language = LANGUAGES.get(source.suffix, "text")
    return f"# {source.name}\n\n````{language}\n{source.read_text(encoding='utf-8').rstrip()}\n````\n"


def listing(folder: Path) -> str:
    """Page of a folder: its files, as links."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return "\n".join([f"# {folder.name}/\n", *(f"* [{name}]({name})" for name in names)]) + "\n"


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- checks of the built site --------------------------------------------------------------------------------


class Page(HTMLParser):
    """Contents of a built page: anchors, links, loaded files, and the elements of the article."""

    COUNTED = ("h1", "h2", "h3", "table", "tr", "pre", "li", "ul", "ol")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.elements: Counter[str] = Counter()
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "article":
            self.inside = True
        if self.inside and tag in self.COUNTED:
            self.elements[tag] += 1
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(found["href"])

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self.inside = False


def problems(site: Path = SITE) -> Iterator[str]:
    """Links of the built site that lead nowhere, and what it would load from a network."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        here = path.relative_to(site)
        if here.name == "404.html":
            continue
        for link in [*page.links, *page.loaded]:
            if link.startswith(("http://", "https://", "//")):
                if link in page.loaded:
                    yield f"{here} loads {link}"
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.is_file():
                yield f"{here}: {link} does not exist"
            elif anchor and target in pages and anchor not in pages[target].ids:
                yield f"{here}: {link} has no such anchor"
    for sheet in site.rglob("*.css"):
        for url in re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", sheet.read_text(encoding="utf-8")):
            yield f"{sheet.relative_to(site)} loads {url}"


def other_elements(build: Path = BUILD, site: Path = SITE) -> Iterator[str]:
    """Pages whose elements MkDocs and a CommonMark parser count differently."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    for path in sorted(build.rglob("*.md")):
        name = path.relative_to(build)
        html = name.with_name("index.html") if name.name == "README.md" else name.with_suffix(".html")
        expected = Page(f"<article>{parser.render(path.read_text(encoding='utf-8'))}</article>").elements
        found = Page((site / html).read_text(encoding="utf-8")).elements
        if different := {tag: (expected[tag], found[tag]) for tag in Page.COUNTED if expected[tag] != found[tag]}:
            yield f"{name}: elements (CommonMark, MkDocs): {different}"


def main() -> None:
    stage()
    config = OUT / "mkdocs.yml"
    write(config, configuration(MAP.read_text(encoding="utf-8")))
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean", "--config-file", str(config)]
    if subprocess.run(command, env=environment).returncode:
        sys.exit("make docs: MkDocs refuses the pages; the lines above have the reasons")
    if found := [*problems(), *other_elements()]:
        sys.exit("\n".join([*found, f"make docs: {len(found)} problems in {SITE}"]))
    print(f"{len(list(SITE.rglob('*.html')))} pages: {SITE / 'index.html'}")


if __name__ == "__main__":
    main()
