"""Find finished stages whose results do not belong to the results beside them in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.recipe import BASE, Recipe
from align.run.manifest import changes, result_id


def stale_stages(run_dir: Path, manifests: Mapping[str, Mapping[str, Any]], recipe: Recipe | None) -> dict[str, str]:
    """{stale stage: reason}; stages that are up to date are absent.

    A stage is stale if a parent was run again after it, if a parent is stale, or if `recipe` has other settings than
    the stage was run with.

    manifests: those of the finished stages by name, parents first. recipe: the run's recipe.json; None: unknown.
    """
    found: dict[str, str] = {}
    for name, manifest in manifests.items():
        reason = _of_parents(run_dir, manifest, found) or _of_settings(name, manifest, recipe)
        if reason:
            found[name] = reason
    return found


def _of_parents(run_dir: Path, manifest: Mapping[str, Any], stale: Mapping[str, str]) -> str | None:
    for parent, made_from in (manifest.get("parent_ids") or {}).items():
        now = result_id(run_dir / parent)
        if now is None:
            return f"its parent '{parent}' has no finished result any more"
        if now != made_from:
            return f"its parent '{parent}' was run again after it"
        if parent in stale:
            return f"its parent '{parent}' is stale"
    return None


def _of_settings(name: str, manifest: Mapping[str, Any], recipe: Recipe | None) -> str | None:
    before = manifest.get("config")
    if recipe is None or not isinstance(before, dict) or name not in (BASE, *recipe.stages):
        return None
    changed = changes(recipe, name, before)
    return f"recipe.json has other settings than it was run with ({changed[0]})" if changed else None
