"""Run a recipe's stages in order, each once. A finished stage has a manifest. All ranks of a run execute this code."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, assert_never

from align.config.ppo import PpoStage
from align.config.recipe import BASE, Recipe, is_path
from align.config.stage import REPORT
from align.config.stages import (
    DpoStage,
    EvaluateStage,
    KtoStage,
    PretrainStage,
    RejectionSampleStage,
    RewardModelStage,
    SampleStage,
    SftStage,
)
from align.errors import UserError
from align.preflight import problems
from align.run import interrupt, manifest
from align.run.context import StageContext, StageResult
from align.run.environment import load_transformers, prepare_process
from align.run.folder import disk_error, is_disk_full, locked, remove_folder, write_json


class PlannedStage(NamedTuple):
    """A stage of this run. keep: its earlier result is kept. resume: continue from its last checkpoint, if any."""

    name: str
    keep: bool
    resume: bool


def run(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    start: str | None = None,
    say: Callable[[str], None] = print,
    status: Callable[[str], None] = lambda line: None,
    progress: Callable[[str], None] = lambda line: None,
    width: int | None = None,
) -> None:
    """Run the stages that are not finished.

    only: run `base` and this stage. start: run this stage and all later ones again. width: of the terminal, for the
    table at the end; None: lines of any length.
    """
    choose(recipe, run_dir, resume=resume, only=only, start=start)
    prepare_process(recipe)
    prints = True
    with ExitStack() as until_the_end:

        def plan() -> list[PlannedStage]:
            chosen, again = refuse_early(recipe, run_dir, resume=resume, only=only, start=start)
            until_the_end.enter_context(locked(run_dir))
            return _begin(recipe, run_dir, chosen, again, resume=resume)

        if recipe.parallel is None:
            stages = plan()
            if not all(stage.keep for stage in stages):
                load_transformers()
                from align.train.device import one_of_several_gpus  # loads torch

                if line := one_of_several_gpus():
                    say(line)
        else:
            from align.launch.processes import require_place

            require_place(recipe.parallel)
            load_transformers()
            from align.parallel import group  # loads torch

            group.join(recipe)
            prints = group.is_main()
            if not prints:
                say = status = progress = _silent
            stages = group.from_rank_0("plan the run", plan)
        for name, keep, resumed in stages:
            if keep:
                say(f"{name}: finished before, kept")
            else:
                _run_stage(StageContext(recipe, name, run_dir, resumed, say, status, progress))
        if recipe.parallel is not None:
            group.leave()
        if prints:
            _report(recipe, run_dir, stages, say, width)


def _report(
    recipe: Recipe, run_dir: Path, stages: list[PlannedStage], say: Callable[[str], None], width: int | None
) -> None:
    """Write the report of a run that has one, or has run a stage that makes one, and print its table."""

    def makes_one(stage: PlannedStage) -> bool:
        return stage.name != BASE and recipe.stages[stage.name].makes == REPORT

    if not (any(map(makes_one, stages)) or (run_dir / "report.json").is_file()):
        return
    if stages[-1].keep or not makes_one(stages[-1]):  # otherwise the stage has just written it
        from align.eval.report.write import write_report

        write_report(run_dir)
    from align.eval.report.headline import headline

    for line in headline(run_dir, width):
        say(line)
    say(f"report: {run_dir / 'report.html'}")


def choose(
    recipe: Recipe, run_dir: Path, *, resume: bool, only: str | None, start: str | None
) -> tuple[list[str], set[str]]:
    """(chosen stages, the chosen stages that run again even if they are finished)."""
    if start is not None and (resume or only is not None):
        other = "--resume" if resume else f"--only {only}"
        raise UserError(f"--from {start} starts stages again, which contradicts {other}; pass only one of the two.")
    order = [BASE, *recipe.stages]
    for flag, name in (("--only", only), ("--from", start)):
        if name is not None and name not in order:
            raise UserError(f"{flag} {name}: the recipe has no such stage; use one of {', '.join(order)}.")
    if only is not None:
        continues = resume and manifest.read_manifest(run_dir / only) is None
        return list(dict.fromkeys([BASE, only])), set() if continues else {only}
    return order, set() if start is None else set(order[order.index(start) :])


def refuse_early(
    recipe: Recipe, run_dir: Path, *, resume: bool, only: str | None, start: str | None
) -> tuple[list[str], set[str]]:
    """The result of `choose`; raises `UserError` for problems that can be found without loading torch."""
    chosen, again = choose(recipe, run_dir, resume=resume, only=only, start=start)
    to_run = [name for name in chosen if name in again or manifest.read_manifest(run_dir / name) is None]
    if found := problems(recipe, to_run):
        raise UserError("\n".join(found))
    for name in (name for name in to_run if name != BASE):
        context = StageContext(recipe, name, run_dir)
        for _, parent, _ in recipe.stages[name].checkpoints():
            if parent not in to_run and not is_path(parent):
                context.checkpoint(parent)
    return chosen, again


def _begin(recipe: Recipe, run_dir: Path, chosen: list[str], again: set[str], *, resume: bool) -> list[PlannedStage]:
    """Raise `UserError` for earlier results that do not match the recipe, then prepare the run folder."""
    for name in chosen:
        if name not in again:
            manifest.require_unchanged(StageContext(recipe, name, run_dir, resume=resume))
    for name in again:
        manifest.remove_record(run_dir / name)
    write_json(run_dir / "recipe.json", recipe.model_dump(mode="json"))
    return [
        PlannedStage(name, manifest.read_manifest(run_dir / name) is not None, resume and name not in again)
        for name in chosen
    ]


def _run_stage(context: StageContext) -> None:
    from transformers import set_seed  # loads torch, as all below

    from align.parallel import group
    from align.train.device import peak_bytes, return_cached_memory
    from align.train.quiet import quieten

    name = context.name
    record = group.from_rank_0(f"start {name}", lambda: manifest.start_record(context))
    context.say(f"{name}: {title(context)}")
    started, clock = datetime.now(UTC), time.perf_counter()
    quieten()
    set_seed(context.seed)  # a stage's random numbers must not depend on whether earlier stages ran in this process
    if context.recipe.parallel is not None:
        group.forget_last_stage()
    return_cached_memory()
    try:
        result = run_stage(context)
    except UserError:
        if group.is_main():
            manifest.remove_empty_record(context.dir)
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_error(context.dir, error) from error
        raise
    group.barrier(f"end of {name}")
    seconds = time.perf_counter() - clock
    if group.is_main():
        manifest.finish_record(context, record, started, seconds, result)
        if not context.recipe.keep_checkpoints:
            remove_folder(context.dir / "checkpoints")
        context.say(f"{name}: done in {seconds:.0f} s, peak memory of the run so far {peak_bytes() / 2**30:.1f} GiB")
        if name != BASE and context.recipe.stages[name].makes == REPORT:
            from align.eval.report.write import write_report

            reports = {path.suffix[1:]: path for path in write_report(context.run_dir) if path.suffix != ".json"}
            if context.recipe.report_to:
                from align.train.trackers import Trackers

                trackers = Trackers(context)
                trackers.log(0, {key: value for key, value in result.metrics.items() if value is not None})
                trackers.attach(reports)
                trackers.close()
    if group.should_stop():
        interrupt.stop()
    interrupt.stop_polling()


def title(context: StageContext) -> str:
    """Description of the stage for the log."""
    if context.name == BASE:
        return "the model that the stages start from"
    stage = context.recipe.stages[context.name]
    return stage.title or stage.kind


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
        case RejectionSampleStage() as stage:
            from align.recipes import rejection_sample

            return rejection_sample.run(stage, context)
        case RewardModelStage() as stage:
            from align.recipes import reward_model

            return reward_model.run(stage, context)
        case DpoStage() as stage:
            from align.recipes import dpo

            return dpo.run(stage, context)
        case KtoStage() as stage:
            from align.recipes import kto

            return kto.run(stage, context)
        case PpoStage() as stage:
            from align.recipes import ppo

            return ppo.run(stage, context)
        case EvaluateStage() as stage:
            from align.recipes import evaluate

            return evaluate.run(stage, context)
        case stage:
            assert_never(stage)


def _silent(line: str) -> None:
    """Print nothing: rank 0 alone prints."""
