"""`make compat`: check align against the CUDA builds of vLLM, on any machine.

    python -m tests.compat                     the versions that pyproject.toml allows: its lowest and its highest
    python -m tests.compat 0.34.0              another version
    python -m tests.compat --source ../other   another checkout's source

Each wheel is downloaded once, without its dependencies, and only its Python files are kept (build/compat, 60 MB each).
Then every import, call, subclass and listed contract of align is compared with these files, and the tests of
tests/unit/rollout/test_vllm_on_gpus.py run with them in place of the installed vLLM. It exits with 1 if something is
missing, and names it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from .check import PACKAGE, describe, problems
from .tree import Tree
from .usage import usage

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "compat"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64", "manylinux2014_x86_64")
LIVE = "tests/unit/rollout/test_vllm_on_gpus.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="versions of vLLM; default: pyproject.toml's lowest and highest")
    parser.add_argument("--source", type=Path, default=ROOT, help="checkout whose source is checked")
    parser.add_argument("--no-tests", action="store_true", help="compare the files only")
    options = parser.parse_args()
    source = options.source.resolve()
    used = usage(source, PACKAGE)
    print(", ".join(f"{count} {what}" for what, count in describe(used).items()), flush=True)
    failed = False
    for version in options.versions or allowed_versions(ROOT):
        folder = unpacked(version, CACHE)
        found = [*problems(Tree(folder), used, source), *pins(folder, source)]
        if not options.no_tests and (source / LIVE).is_file():
            found += failing_tests(folder, source)
        failed |= bool(found)
        print(f"{PACKAGE} {version}: {f'{len(found)} problems' if found else 'compatible'}", flush=True)
        for problem in found:
            print(f"  {problem}", flush=True)
    return int(failed)


def requirements(source: Path) -> dict[str, Requirement]:
    """The project's requirements by name, with those of its extra `gpu`."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["gpu"])]
    return {each.name.lower(): each for each in every}


def allowed_versions(source: Path) -> list[str]:
    """The versions at the two ends of pyproject.toml's range of vLLM, which are part of the range."""
    allowed = requirements(source)[PACKAGE].specifier
    ends = sorted({spec.version for spec in allowed}, key=Version)
    excluded = [end for end in ends if not allowed.contains(end)]
    assert not excluded, f"{PACKAGE}{allowed} excludes {excluded[0]}; name the highest version that is checked"
    return ends


def unpacked(version: str, cache: Path) -> Path:
    """Folder with the Python files of one version, downloaded if it is missing."""
    folder = cache / f"{PACKAGE}-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    print(f"{PACKAGE} {version}: downloading its wheel (about 340 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.11", *(word for name in PLATFORMS for word in ("--platform", name))]
        subprocess.run([*command, "--dest", work, f"{PACKAGE}=={version}"], check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            kept = [name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name]
            archive.extractall(Path(work) / "files", kept)
        (Path(work) / "files").rename(folder)
    return folder


def pins(folder: Path, source: Path) -> list[str]:
    """Versions of libraries that this vLLM requires exactly and pyproject.toml excludes."""
    ours = requirements(source)
    (metadata,) = folder.glob("*.dist-info/METADATA")
    found = []
    for line in re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(encoding="utf-8"), re.MULTILINE):
        theirs = Requirement(line)
        mine = ours.get(theirs.name.lower())
        for exact in (spec.version for spec in theirs.specifier if spec.operator == "=="):
            applies = theirs.marker is None or "extra" not in str(theirs.marker)
            if mine is not None and applies and not mine.specifier.contains(exact):
                found.append(f"it requires {theirs.name}=={exact}, but pyproject.toml allows {mine.specifier}")
    return found


def failing_tests(folder: Path, source: Path) -> list[str]:
    """Tests that fail with these files in place of the installed vLLM."""
    paths = [str(folder), str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", LIVE]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failures or ([] if done.returncode == 0 else [f"{LIVE}: {lines[-1]}"])


if __name__ == "__main__":
    sys.exit(main())
