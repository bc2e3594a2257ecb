"""What a stage function is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.parts import Lora
from align.config.paths import local_path
from align.config.recipe import BASE, Recipe, is_path
from align.errors import UserError
from align.run.folder import MODEL


@dataclass(frozen=True)
class StageResult:
    """What a stage reports to its manifest; everything else it makes is in its folder.

    metrics: final metrics, by name.
    data: counts of rows read, used and dropped.
    parameters: total, active and trainable parameters of the model, if the stage has one.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] | None = None


@dataclass(frozen=True)
class StageContext:
    """Where and how a stage runs: the recipe, the stage's name and folder, and how it reports progress."""

    recipe: Recipe
    name: str
    run_dir: Path
    resume: bool = False
    say: Callable[[str], None] = field(default=print)
    """Prints a line for the person who watches."""
    status: Callable[[str], None] = field(default=lambda line: None)
    """Shows what is happening right now, until the next line; only on a terminal."""

    @property
    def seed(self) -> int:
        """Differs from stage to stage and depends on nothing but the recipe."""
        position = 0 if self.name == BASE else 1 + list(self.recipe.stages).index(self.name)
        return (self.recipe.seed + 1000 * position) % 2**32

    def trained_dtype(self, lora: Lora | None) -> str:
        """Precision in which a trained model is loaded; `lora` is its section in the recipe.

        Full fine-tuning keeps float32 weights, because bf16's 8 bits would swallow most of an update. Under LoRA the
        frozen weights have the recipe's precision and the adapters float32. DeepSpeed keeps its own float32 weights.
        """
        return self.recipe.dtype if lora or self.recipe.parallel else "float32"

    @property
    def dir(self) -> Path:
        return self.run_dir / self.name

    @property
    def stage_dirs(self) -> dict[str, Path]:
        return {name: self.run_dir / name for name in self.recipe.stages}

    def checkpoint(self, reference: str) -> Path:
        """The folder of a checkpoint named by stage, as `base`, or by path."""
        if is_path(reference):
            path = local_path(reference)
            if (path / MODEL / "config.json").is_file():
                return path / MODEL
            if not (path / "config.json").is_file():
                raise UserError(f"stages.{self.name}: '{reference}' has no config.json; give a checkpoint folder.")
            return path
        path = self.run_dir / reference / MODEL
        if not (path / "config.json").is_file():
            raise UserError(
                f"stages.{self.name} needs the checkpoint of '{reference}', which {path} does not hold; "
                f"run it first (--only {reference})."
            )
        return path
