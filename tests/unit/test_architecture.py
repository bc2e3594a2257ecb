"""Rules of the architecture: a module imports only lower layers, some heavy libraries may be imported only in certain
folders, and recipes load without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"errors"},
    {"config", "losses"},
    {"launch", "run"},
    {"data"},
    {"models"},
    {"parallel"},
    {"plan"},
    {"train"},
    {"rollout"},
    {"reward", "serve"},
    {"eval", "rl"},
    {"recipes"},
    {"preflight", "doctor", "watch"},
    {"pipeline", "chat", "smoke", "draft", "sweep"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FENCES = {
    "vllm": ("align/models/hunyuan/vllm", "align/rollout/", "align/serve/"),
    "deepspeed": ("align/parallel/",),
    "peft": ("align/models/lora",),
    "datasets": ("align/data/", "align/train/steps.py", "align/train/quiet.py"),
    "trl": ("align/recipes/", "align/train/", "align/data/"),
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "vllm", "deepspeed", "accelerate"}


def modules() -> list[tuple[str, Path]]:
    """(path under align/ as imported, file) of every module of the library."""
    found = []
    for package in ("align", "reward", "eval", "recipes"):
        for file in (ROOT / package).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            found.append((name if package == "align" else f"align/{name}", file))
    return found


def imports(source: str) -> list[tuple[str, bool]]:
    """(module, True if at top level) of every import."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append((node.module, node in tree.body))
    return found


def violations(name: str, source: str) -> list[str]:
    layer = name.split("/")[1].removesuffix(".py")
    problems = []
    for module, top_level in imports(source):
        root, *rest = module.split(".")
        if root == "align" and rest and layer in LEVEL and rest[0] in LEVEL:
            same_row = LEVEL[rest[0]] == LEVEL[layer] and rest[0] != layer
            if LEVEL[rest[0]] > LEVEL[layer] or same_row:
                problems.append(f"{name} imports {module}, which is not below it")
        if root in FENCES and not name.startswith(FENCES[root]):
            problems.append(f"{name} imports {root}")
        if layer in ("cli", "pipeline", "config", "errors") and root in HEAVY and top_level:
            problems.append(f"{name} imports {root} at the top")
    return problems


def test_imports_go_down_and_fences_hold() -> None:
    assert [problem for name, file in modules() for problem in violations(name, file.read_text())] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("align/losses/x.py", "import align.models"),
        ("align/models/x.py", "def f():\n    from align.train.trainer import fit"),
        ("align/rollout/x.py", "from align.reward import mixture"),
        ("align/train/x.py", "import vllm"),
        ("align/cli/x.py", "import torch"),
    ],
)
def test_a_planted_violation_is_seen(name: str, source: str) -> None:
    assert violations(name, source)


FAMILYS_OWN = re.compile(r"from align\.models\.hunyuan\S* import .*HunYuan|model_type\s*[!=]=\s*[\"']")
"""A class of one family, or a comparison with the name of one family."""


def test_only_models_name_the_classes_of_a_family() -> None:
    others = [(name, file.read_text()) for name, file in modules() if not name.startswith("align/models/")]
    assert [name for name, source in others if FAMILYS_OWN.search(source)] == []


@pytest.mark.parametrize(
    "source", ["    from align.models.hunyuan.modeling import A, HunYuanModel", 'if config.model_type == "gpt_oss":']
)
def test_a_family_named_elsewhere_is_seen(source: str) -> None:
    assert FAMILYS_OWN.search(source)


def test_recipes_validate_without_torch_in_a_second() -> None:
    recipes = sorted(str(path) for path in (ROOT / "recipes").glob("*.yaml"))
    assert recipes
    code = (
        "import sys, align.cli\n"
        f"align.cli.main(['check', '--without-files', *{recipes!r}])\n"
        "align.cli.main(['check', 'tiny', 'quickstart'])\n"
        f"assert not set(sys.modules) & {HEAVY!r}, set(sys.modules) & {HEAVY!r}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


@pytest.mark.parametrize("package", ["reward", "eval", "recipes"])
def test_a_linked_package_refuses_its_other_name(package: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"import it as align.{package}" in done.stderr


def test_links_are_relative() -> None:
    for package in ("reward", "eval", "recipes"):
        assert str((ROOT / "align" / package).readlink()) == f"../{package}"


def test_readme_tree_equals_the_disk() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("<!-- tree -->")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip() and not line.startswith("```")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked} - {".gitignore", ".ci"}
    inner = {"align/" + path.split("/")[1] for path in tracked if path.startswith("align/")} - {"align/__init__.py"}
    assert named == top | inner
