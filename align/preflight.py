"""Preflight checks: a recipe's files exist and its processes fit its models. Nothing here loads torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from align.config.data_files import list_files
from align.config.families import TABLE
from align.config.filters import EvaluationSet, LanguageFilter
from align.config.parallel import Parallel
from align.config.parts import FileSource, HotStartModel, Model, PretrainedModel, ScratchModel
from align.config.paths import local_path
from align.config.presets import DEFAULT_FAMILY, GROWN, unknown_keys
from align.config.recipe import BASE, Recipe, is_path
from align.config.rewards import CodeReward, FunctionReward
from align.config.stage import LANGUAGE_MODEL, find
from align.config.stages import EvaluateStage, Stage
from align.data.accepted import ACCEPTED, sources_of
from align.data.filters.language import with_members
from align.data.shapes import variables_problem
from align.data.sources import check_first_rows
from align.errors import UserError
from align.eval.task import resolve_task
from align.parallel.offload import require_folder
from align.reward.code import build_sandbox
from align.reward.functions import find_reward_function
from align.rollout.refusals import REMEDY, Engine, refusal
from align.run.adapted import weights_of
from align.run.checkpoint import checkpoint_folder
from align.run.folder import MODEL
from align.run.peft_folder import is_peft_folder, local_base
from align.run.refusals import config_problem, path_problem, role_problem, tokenizer_problem, zero_3_problem


def problems(recipe: Recipe, stages: Iterable[str], *, files: bool = True) -> list[str]:
    """The problems that keep `stages` from running, one sentence each. Results of earlier stages are not checked.

    files: also check the files on this machine, not only the recipe.
    """
    stages, found = list(stages), list[str]()
    if files:
        for name in stages:
            found += _of_model(recipe.model) if name == BASE else _of_stage(name, recipe.stages[name])
            found += _of_engine(recipe, name) if name != BASE else ()
    for name in stages:
        if name != BASE and isinstance(stage := recipe.stages[name], EvaluateStage):
            found += _of_tasks(name, stage)
        if name != BASE and files:
            found += _of_task_names(name, recipe.stages[name])
    if recipe.parallel is not None:
        found += _of_machines(recipe.parallel) if files else []
        if problem := recipe.parallel.process_group_problem():
            found.append(problem)
        for name in stages:
            if name != BASE:
                found += _of_sharding(recipe, name, recipe.parallel, files)
    return list(dict.fromkeys(found))


def _of_model(model: Model) -> Iterator[str]:
    if isinstance(model, ScratchModel) and (problem := _of_config(model.sizes())):
        yield f"model.model_type: {problem}"
    match model:
        case ScratchModel(tokenizer=str(path)):
            yield from _folder("model.tokenizer", path)
        case ScratchModel():
            for field, source in find(model, FileSource):
                yield from _file(f"model.{field}", source)
        case PretrainedModel(path=path, config=changes):
            yield from _folder("model.path", path)
            yield from _of_kind("model.path", path)
            yield from _of_tokenizer("model.path", path)
            if changes and (config := _config_in(path)) is not None:
                family = config.get("model_type", DEFAULT_FAMILY)
                yield from (f"{problem}." for problem in unknown_keys(changes, family))
            yield from _of_template(path, model.chat_template_kwargs)
        case HotStartModel(source=path, config=changes):
            yield from _folder("model.source", path)
            yield from _of_tokenizer("model.source", path)
            if changes and (config := _config_in(path)) is not None and config.get("model_type") in GROWN:
                yield from (f"{problem}." for problem in unknown_keys(changes, GROWN[config["model_type"]]))
            yield from _of_template(path, model.chat_template_kwargs)


def _of_template(path: str, variables: Mapping[str, Any]) -> Iterator[str]:
    """Variables that the checkpoint's chat template does not read, if it is on this machine."""
    if not variables:
        return
    try:
        folder = local_base(local_path(path)) or local_path(path)
        files = [file.read_text(encoding="utf-8") for file in folder.glob("chat_template*")]
        files += [file.read_text(encoding="utf-8") for file in folder.glob("tokenizer_config.json")]
    except (OSError, ValueError, UserError):
        return
    if files and (problem := variables_problem(variables, "\n".join(files))):
        yield f"model.chat_template_kwargs: {problem}"


def _of_stage(name: str, stage: Stage) -> Iterator[str]:
    checked = []
    for field, source, kind in sources_of(stage):
        if isinstance(source, FileSource):
            checked.append(source)
            yield from _data(f"stages.{name}.{field}", partial(check_first_rows, source, ACCEPTED[kind]))
    for field, source in find(stage, FileSource):
        if not any(source is other for other in checked):
            yield from _file(f"stages.{name}.{field}", source)
    for field, target in find(stage, EvaluationSet):
        yield from _data(f"stages.{name}.{field}", partial(list_files, target.path))
    for field, settings in find(stage, LanguageFilter):
        yield from _data(f"stages.{name}.{field}", partial(with_members, settings.keep))
    for field, reference, accepted in stage.checkpoints():
        if is_path(reference):
            problem = f"'{reference}' has no config.json; set it to the folder of a checkpoint."
            yield from _unless(_is_checkpoint, f"stages.{name}.{field}", reference, problem)
            yield from _of_kind(f"stages.{name}.{field}", reference, accepted)
    for field, reward in find(stage, FunctionReward):
        try:
            find_reward_function(reward.path)
        except UserError as error:
            yield f"stages.{name}.{field}: {error}"
    for field, code in find(stage, CodeReward):
        try:
            build_sandbox(code)
        except UserError as error:
            yield f"stages.{name}.{field}: {error}"


def _of_kind(where: str, path: str, accepted: Collection[str] = (LANGUAGE_MODEL,)) -> Iterator[str]:
    """Reason why the checkpoint at `path` cannot be used, if it is on this machine.

    accepted: kinds of results that the recipe accepts here.
    """
    config = _config_in(path)
    try:
        problem = path_problem(local_path(path)) if config is None else _of_config(config)
    except UserError:
        return
    if problem is None and config is not None:
        problem = role_problem(config, accepted)
    if problem is not None:
        yield f"{where}: {path}: {problem}"
        return
    if config is None:
        return
    try:
        weights_of(checkpoint_folder(Path(path)))
    except UserError as error:  # its base is missing or another one
        yield f"{where}: {error}"


def _of_tokenizer(where: str, path: str) -> Iterator[str]:
    """A checkpoint on this machine without a tokenizer."""
    if _config_in(path) is not None:
        folder = local_path(path)
        inner = folder / MODEL if (folder / MODEL / "config.json").is_file() else folder
        problem = tokenizer_problem(inner)
        if problem and not ((base := local_base(folder)) and tokenizer_problem(base) is None):
            yield f"{where}: {path}: {problem}"


def _of_config(config: Mapping[str, Any]) -> str | None:
    """Reason why a model with these values in config.json cannot be used. Loads torch only for an unknown family."""
    kind, problem = config.get("model_type", DEFAULT_FAMILY), config_problem(config)
    if problem or kind == DEFAULT_FAMILY or kind in TABLE:
        return problem
    from align.models.family import model_types  # also families of own code

    return config_problem(config, model_types())


def _of_engine(recipe: Recipe, name: str) -> Iterator[str]:
    """Reason why vLLM cannot run the model that a stage samples from. Here a machine counts as one with a GPU."""
    reference, rollout = recipe.stages[name].generates_with, getattr(recipe.stages[name], "rollout", None)
    if reference is None or rollout is None or rollout.engine == "huggingface":
        return
    while reference in recipe.stages:
        reference = getattr(recipe.stages[reference], "init_from", BASE)
    config = _config_of(recipe.model, files=True) if reference == BASE else _config_in(reference)
    if config is None or "model_type" not in config:
        return
    engine = Engine(recipe.dtype, has_gpu=True, longest=rollout.max_model_length)
    if reason := refusal(SimpleNamespace(**config), engine):
        yield f"stages.{name}.rollout: vLLM cannot run this {config['model_type']} model: {reason}. {REMEDY}"


def _of_tasks(name: str, stage: EvaluateStage) -> Iterator[str]:
    for settings in stage.prompt_tasks:
        try:
            resolve_task(settings, stage.rollout)
        except UserError as error:
            yield f"stages.{name}.tasks: {error}"


def _of_task_names(name: str, stage: Stage) -> Iterator[str]:
    """Tasks of `align eval` that are unknown, invalid, or lack their data."""
    for field, names, options in stage.benchmarks():
        from align.eval.stage_tasks import require_tasks  # loads torch

        try:
            require_tasks(f"stages.{name}", field, names, options)
        except UserError as error:
            yield str(error)


def _of_machines(parallel: Parallel) -> Iterator[str]:
    from align.launch.processes import slots_of

    try:
        slots_of(parallel)
    except UserError as error:
        yield str(error)
    if parallel.offload.path is not None:
        try:
            require_folder(parallel.offload.path)
        except UserError as error:
            yield str(error)


def _of_sharding(recipe: Recipe, name: str, parallel: Parallel, files: bool) -> Iterator[str]:
    """Models of a training stage that ZeRO-3 cannot shard, or whose experts cannot be sharded evenly."""
    from align.plan.shape import expert_counts

    stage = recipe.stages[name]
    if not stage.trains:
        return
    for where, reference, _ in stage.checkpoints():
        owner = f"the model of stages.{name}.{where}"
        while reference in recipe.stages:
            reference = getattr(recipe.stages[reference], "init_from", BASE)
        if reference == BASE:
            owner, config = "the recipe's model", _config_of(recipe.model, files)
        else:
            config = _config_in(reference) if files else None
        if config is None:
            continue
        if parallel.zero_stage == 3 and (problem := zero_3_problem(config.get("model_type"))):
            yield problem
        for experts in expert_counts(config):
            if problem := parallel.expert_group_problem(experts, owner):
                yield problem


def _config_of(model: Model, files: bool) -> dict[str, Any] | None:
    """The config.json values of a model; None if the checkpoint is not on this machine or `files` is false."""
    match model:
        case ScratchModel(config=changes):
            return model.sizes() | changes
        case HotStartModel(experts=experts, config=changes):
            return {"num_experts": experts} | changes
        case PretrainedModel(path=path, config=changes):
            config = _config_in(path) if files else None
            return None if config is None else config | changes


def _config_in(path: str) -> dict[str, Any] | None:
    """The config.json of a checkpoint, or of an adapter's base; None if it is missing or damaged, which other checks
    report."""
    for inner in (MODEL, ".", None):
        try:
            folder = local_base(local_path(path)) if inner is None else local_path(path) / inner
            if folder is None:
                continue
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, UserError):
            continue
        return values if isinstance(values, dict) else None
    return None


def _file(where: str, source: FileSource) -> Iterator[str]:
    return _data(where, source.files)


def _data(where: str, check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except UserError as error:
        yield f"{where}: {error}"


def _folder(where: str, path: str) -> Iterator[str]:
    if path.startswith((".", "/", "~")) or path.count("/") > 1:  # otherwise it may be a hub id
        yield from _unless(Path.exists, where, path, _missing(path))


def _missing(path: str) -> str:
    return f"{path} does not exist (paths are relative to {Path.cwd()})."


def _is_checkpoint(folder: Path) -> bool:
    return any((path / "config.json").is_file() for path in (folder / MODEL, folder)) or is_peft_folder(folder)


def _unless(holds: Callable[[Path], bool], where: str, path: str, problem: str) -> Iterator[str]:
    """Yield `problem` if `holds` is false for a path in the recipe."""
    try:
        if not holds(local_path(path)):
            yield f"{where}: {problem}"
    except UserError as error:
        yield f"{where}: {error}"
