"""Input and result of a stage's `run` function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.lora import Lora
from align.config.paths import local_path
from align.config.recipe import BASE, Recipe, is_path
from align.errors import UserError
from align.run.adapted import with_base
from align.run.folder import MODEL


@dataclass(frozen=True)
class StageResult:
    """The part of a stage's result that is written to its manifest. Other results are files in the stage's folder.

    metrics     final metrics, by name
    data        counts of rows read, used and dropped
    parameters  total, active and trainable parameters of the model, if the stage has one
    weights     {model: {group: numbers of weights in 4 bits, kept in the model's dtype and trained, and their bytes}},
                for models with weights in 4 bits
    training    steps and seconds of training since the stage was last started or resumed, evaluation included
    """

    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] | None = None
    training: dict[str, float] | None = None
    weights: dict[str, dict[str, dict[str, int]]] | None = None


@dataclass(frozen=True)
class StageContext:
    """The recipe, the stage's name and folder, and functions that report progress.

    name      the stage's name
    resume    continue from the last checkpoint, if any
    say       prints a line; a no-op on ranks other than 0
    status    shows a line until the next one, on a terminal only
    progress  shows the progress of a long step: like `status` on a terminal, otherwise as a line every few seconds
    """

    recipe: Recipe
    name: str
    run_dir: Path
    resume: bool = False
    say: Callable[[str], None] = field(default=print)
    status: Callable[[str], None] = field(default=lambda line: None)
    progress: Callable[[str], None] = field(default=lambda line: None)

    @property
    def seed(self) -> int:
        """Seed of the stage's random choices; depends on its seed or the recipe's, and on the stage's position only."""
        if self.name == BASE:
            return self.recipe.seed % 2**32
        own, position = self.recipe.stages[self.name].seed, 1 + list(self.recipe.stages).index(self.name)
        return ((self.recipe.seed if own is None else own) + 1000 * position) % 2**32

    def trained_dtype(self, lora: Lora | None) -> str:
        """Dtype of the weights of a trained model. lora: its section in the recipe.

        Full fine-tuning uses float32 weights, because rounding to bf16's 8 bits would lose most of an update. Under
        LoRA the frozen weights have the recipe's dtype and the adapters are float32. Under DeepSpeed the weights have
        the recipe's dtype, and the optimizer keeps float32 copies.
        """
        return self.recipe.dtype if lora or self.recipe.parallel else "float32"

    @property
    def dir(self) -> Path:
        return self.run_dir / self.name

    @property
    def stage_dirs(self) -> dict[str, Path]:
        return {name: self.run_dir / name for name in self.recipe.stages}

    def checkpoint(self, reference: str) -> Path:
        """Folder of a checkpoint. reference: a stage's name, `base`, or a path."""
        if is_path(reference):
            path = local_path(reference)
            if (path / MODEL / "config.json").is_file():
                return path / MODEL
            path = with_base(path)
            if not (path / "config.json").is_file():
                raise UserError(
                    f"stages.{self.name}: '{reference}' has no config.json; set it to the folder of a checkpoint."
                )
            return path
        path = self.run_dir / reference / MODEL
        if not (path / "config.json").is_file():
            raise UserError(
                f"stages.{self.name} needs the checkpoint of '{reference}', but {path} has none; "
                f"run that stage first (--only {reference})."
            )
        return path
