"""requirements/gpu.lock and the Dockerfile agree with pyproject.toml, cpu.lock, each other and the files on disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CUDA_CHOOSES = {"torch", "certifi", "apache-tvm-ffi"}
"""Packages whose versions may differ between the locks, because the CUDA build of vLLM determines them."""


def read_lock(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def broken(requirements: list[str], pins: dict[str, str]) -> list[str]:
    """The requirements that `pins` do not satisfy."""
    parsed = [Requirement(text) for text in requirements]
    return [str(r) for r in parsed if (pin := pins.get(canonicalize_name(r.name))) is None or pin not in r.specifier]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, with continued lines joined and comments dropped."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = lines.replace("\\\n", " ")
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
COPIED = [part for name, rest in DOCKERFILE if name == "COPY" and "--from" not in rest for part in rest.split()[:-1]]


def argument(instruction: str) -> str:
    return [rest for name, rest in DOCKERFILE if name == instruction][-1]


@pytest.mark.parametrize("extra", ["gpu", "quickstart", "eval"])
def test_the_gpu_lock_satisfies_the_project(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert broken([*project["dependencies"], *project["optional-dependencies"][extra]], read_lock("gpu.lock")) == []


def test_an_unsatisfied_requirement_is_seen() -> None:
    pins = {"torch": "2.12.0", "vllm": "0.33.0"}
    assert broken(["torch>=2.13,<2.15", "vllm>=0.32,<0.34", "trl>=1.16"], pins) == ["torch<2.15,>=2.13", "trl>=1.16"]


def test_both_locks_have_the_same_versions() -> None:
    cpu, gpu = read_lock("cpu.lock"), read_lock("gpu.lock")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} <= CUDA_CHOOSES
    assert not [name for name, version in gpu.items() if "+" in version], "PyPI has no local versions"


def test_the_gpu_lock_keeps_the_versions_that_are_asked_for() -> None:
    lines = (ROOT / "requirements/gpu.in").read_text(encoding="utf-8").splitlines()
    assert broken([line for line in lines if line and not line.startswith("#")], read_lock("gpu.lock")) == []


def test_the_image_installs_the_lock_for_its_cuda_and_python() -> None:
    gpu = read_lock("gpu.lock")
    base = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-\S+", argument("FROM"))
    assert base is not None
    # DeepSpeed compares the version of nvcc with the one that torch was built for before it compiles.
    assert gpu["nvidia-cuda-runtime"].startswith(f"{base[1]}.")
    runs = [rest for name, rest in DOCKERFILE if name == "RUN"]
    assert any(run == "uv pip install --no-deps -r requirements/gpu.lock" for run in runs)
    assert "requirements/gpu.lock" in COPIED
    assert any("--python 3.11 " in run for run in runs), "the lock is resolved for Python 3.11"
    assert any("libaio-dev" in run.split() for run in runs)


def test_the_image_runs_align_without_root() -> None:
    names = [name for name, _ in DOCKERFILE]
    assert argument("ENTRYPOINT") == '["align"]'
    assert int(argument("USER")) > 0
    assert "RUN" not in names[names.index("USER") :]
    assert "HF_HUB_OFFLINE" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    kept, dropped = [], []
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            (kept if line.startswith("!") else dropped).append(line.removeprefix("!"))
    assert dropped[0] == "*"
    for path in COPIED:
        assert (ROOT / path).exists(), path
        assert any(fnmatch(path, pattern) or path.startswith(f"{pattern}/") for pattern in kept), path


def test_the_copied_files_make_a_whole_package(tmp_path: Path) -> None:
    """Build a wheel from the files that the image copies, as the image's last `uv pip install` does."""
    for path in COPIED:
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, tmp_path / path, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    tracked = subprocess.run(
        ["git", "ls-files", "align", "reward", "eval", "recipes"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    links = {"align/reward", "align/eval", "align/recipes"}
    wanted = {path if path.startswith("align/") else f"align/{path}" for path in tracked} - links
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())
