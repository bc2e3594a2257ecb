"""Line 0: the findings of `align doctor`, and whether the modules that use vLLM can be imported."""

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
    """Run line 0: `align doctor`'s facts, warnings and problems, and the imports of the modules that use vLLM."""
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
    """Import every module of `align.rollout` and the vLLM model classes, as engines and servers do."""
    prepare_vllm()
    broken = []
    modules = [module.name for module in walk_packages(align.rollout.__path__, "align.rollout.")]
    for name in [*modules, "align.models.hunyuan.vllm"]:
        try:
            import_module(name)
        except (ImportError, AttributeError, TypeError) as error:
            broken.append(f"{name}: {error}")
    return holds("imports of vLLM", "all", broken[0] if broken else f"{len(modules) + 1} modules", not broken)
