"""Facts about a kind of stage: its sources, the checkpoints it refers to, its result.

Read these rather than test a stage's class. Exceptions: the dispatch in align/pipeline.py, align/plan/job.py, the
batch-size check in recipe.py, and the preflight check of evaluation tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple, TypeVar

from pydantic import Field

from align.config.evaluation import EvaluateDuring, TaskOptions
from align.config.parts import StageSource
from align.config.section import Section

LANGUAGE_MODEL, REWARD_MODEL, REPORT = "a language model", "a reward model", "a report"
PAIRS, COMPLETIONS = "preference pairs", "prompts with completions"
Found = TypeVar("Found")


class Reference(NamedTuple):
    """A field that names an earlier stage, `base`, or a checkpoint folder.

    field   dotted path of the field below the stage, for example `critic.init_from`
    name    its value
    accepts kinds of result that the field accepts
    """

    field: str
    name: str
    accepts: tuple[str, ...]


class Benchmarks(NamedTuple):
    """Tasks of `align eval` in a stage.

    field   dotted path of the field below the stage
    names   the tasks
    options their options
    """

    field: str
    names: list[str]
    options: TaskOptions


class StageBase(Section):
    """Base of every stage. Subclasses state their result and the checkpoints they refer to."""

    if TYPE_CHECKING:
        kind: str
    title: ClassVar[str] = ""
    """Description of the stage for the log. Default: its kind."""
    makes: ClassVar[str]
    """Result that later stages can use: one of the constants above."""
    reads: ClassVar[tuple[str, ...]] = (PAIRS, COMPLETIONS)
    """Results of earlier stages that the stage accepts as rows."""
    trains: ClassVar[bool] = False
    """True if the stage updates weights. For such stages the preflight checks that `expert_parallel_size` divides the
    number of experts. `align serve-rollout` without `--stage` serves the first of them that generates completions."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of this stage's random choices. Default: the recipe's `seed`."""

    def checkpoints(self) -> Iterator[Reference]:
        """Checkpoints that the stage loads."""
        yield from ()

    def references(self) -> Iterator[Reference]:
        """Checkpoints that the stage loads, then earlier stages whose rows it reads."""
        yield from self.checkpoints()
        for field, source in find(self, StageSource):
            yield Reference(field, source.stage, self.reads)

    @property
    def result(self) -> str:
        """Result that later stages can use, if it depends on the settings; otherwise `makes`."""
        return self.makes

    def benchmarks(self) -> Iterator[Benchmarks]:
        """Tasks of `align eval` that the stage runs."""
        yield from ()

    @property
    def generates_with(self) -> str | None:
        """Checkpoint of the rollout engine at the start of the stage; None if the stage generates no completions."""
        return None


class StageWithParent(StageBase):
    """Settings of every stage that starts from one checkpoint."""

    starts_from: ClassVar[tuple[str, ...]] = (LANGUAGE_MODEL,)
    """Results that `init_from` accepts."""

    init_from: str = "base"
    """Checkpoint the weights come from: an earlier stage, `base` (the recipe's model), or a checkpoint folder."""

    def checkpoints(self) -> Iterator[Reference]:
        yield Reference("init_from", self.init_from, self.starts_from)


def benchmarks_during(settings: EvaluateDuring | None) -> Iterator[Benchmarks]:
    """The tasks of an evaluation during training."""
    if settings is not None:
        yield Benchmarks("evaluate.tasks", settings.tasks, settings)


def find(section: Section, kind: type[Found], path: str = "") -> Iterator[tuple[str, Found]]:
    """Every instance of `kind` in a section and in the sections below it, with the dotted path of its field.

    On the way to a match, a list item appears in the path as its `name`, or as its position if its class has none. A
    match that is itself a list item has the path of the list.
    """
    for name in type(section).model_fields:
        field, value = f"{path}{name}", getattr(section, name)
        for position, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, kind):
                yield field, item
            elif isinstance(item, Section):
                place = f".{getattr(item, 'name', position)}" if isinstance(value, list) else ""
                yield from find(item, kind, f"{field}{place}.")
