"""Line 0: what `align doctor` finds, and whether the installed vLLM has what align imports from it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import align.rollout
from align.doctor import examine
from align.rollout.vllm_options import prepare_vllm
from align.smoke.machine import Machine
from align.smoke.table import Check, fact, holds, skipped


def check(machine: Machine, folder: Path) -> list[Check]:
    """The machine, the installation and their problems as doctor sees them, and the imports of all that uses vLLM."""
    findings = examine()
    versions = {name: package["version"] for name, package in findings["packages"].items()}
    facts = findings["uses"] | findings["report"] | {name: value for name, value in versions.items() if value}
    checks = [fact(name, value) for name, value in facts.items()]
    checks += [Check("warning", "none", sentence, "slow") for sentence in findings["warnings"]]
    checks += [Check("problem", "none", sentence, "WRONG") for sentence in findings["problems"]]
    checks.append(holds("doctor", "ready", findings["verdict"], findings["verdict"].startswith("ready")))
    if versions["vllm"] is None:
        return [*checks, skipped("imports of vLLM", "vLLM is not installed: align doctor")]
    return [*checks, imports()]


def imports() -> Check:
    """Import every module of the rollout package and the model classes, as an engine and a server do."""
    prepare_vllm()
    broken = []
    modules = [module.name for module in walk_packages(align.rollout.__path__, "align.rollout.")]
    for name in [*modules, "align.models.hunyuan.vllm"]:
        try:
            import_module(name)
        except (ImportError, AttributeError, TypeError) as error:
            broken.append(f"{name}: {error}")
    return holds("imports of vLLM", "all", broken[0] if broken else f"{len(modules) + 1} modules", not broken)
