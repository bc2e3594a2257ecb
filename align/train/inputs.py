"""What a recipe's stages read from disk: whether it is there, asked before anything is loaded. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from align.config.parts import FileSource, HotStartModel, Model, PretrainedModel, ScratchModel, Source
from align.config.ppo import PpoStage
from align.config.recipe import BASE, Recipe, is_path, references
from align.config.rewards import FunctionReward
from align.config.stages import Stage
from align.errors import UserError
from align.reward.functions import find_reward_function
from align.train.run_folder import MODEL


def missing(recipe: Recipe, stages: Iterable[str]) -> list[str]:
    """One sentence for each file or folder that is not there; what earlier stages make is not looked for."""
    found: list[str] = []
    for name in stages:
        absent = _of_model(recipe.model) if name == BASE else _of_stage(name, recipe.stages[name])
        found += (sentence for sentence in absent if sentence not in found)
    return found


def _of_model(model: Model) -> Iterator[str]:
    match model:
        case ScratchModel(tokenizer=str(path)):
            yield from _folder("model.tokenizer", path)
        case ScratchModel(tokenizer=tokenizer) if not isinstance(tokenizer, str):
            yield from _files("model.tokenizer.data", tokenizer.data)
        case PretrainedModel(path=path):
            yield from _folder("model.path", path)
        case HotStartModel(source=path):
            yield from _folder("model.source", path)


def _of_stage(name: str, stage: Stage) -> Iterator[str]:
    for holder, where in ((stage, name), (getattr(stage, "data", None), f"{name}.data")):
        for field in ("train", "held_out", "prompts", "preferences"):
            yield from _files(f"stages.{where}.{field}", getattr(holder, field, None) or ())
    for where, reference in references(stage):
        if where == "data" or not is_path(reference):
            continue
        folder = Path(reference)
        if not any((path / "config.json").is_file() for path in (folder / MODEL, folder)):
            yield f"stages.{name}.{where}: '{reference}' has no config.json; give a checkpoint folder."
    if isinstance(stage, PpoStage):
        for reward in stage.rewards:
            if isinstance(reward, FunctionReward):
                try:
                    find_reward_function(reward.path)
                except UserError as error:
                    yield f"stages.{name}.rewards: {error}"


def _files(where: str, sources: Iterable[Source]) -> Iterator[str]:
    for source in sources:
        if isinstance(source, FileSource) and not Path(source.path).expanduser().exists():
            yield f"{where}: {source.path} does not exist (paths are relative to {Path.cwd()})."


def _folder(where: str, path: str) -> Iterator[str]:
    """Where the path can be a hub's id, only the hub knows."""
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if is_local and not Path(path).expanduser().exists():
        yield f"{where}: {path} does not exist (paths are relative to {Path.cwd()})."
