"""Suites: lists of tasks with their number of examples, for `align eval --tasks suite:NAME`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from align.config.section import Section


class SuiteTask(Section):
    """One task of a suite."""

    task: str
    """Name of a task of lm-evaluation-harness, or a file of the user."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Number of examples in the prompt. Default: the task's own."""
    fixed_shots: bool = True
    """Use the same examples for every document, the first of the task's. They are then computed once. Otherwise the
    harness's choice, which for most tasks draws examples for each document."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """Changes of the task's generation settings, for example `max_gen_toks`."""


class Suite(Section):
    """A list of tasks."""

    title: str
    """The benchmarks of the suite, in one line."""
    chat: bool = False
    """Render prompts with the chat template, for models that were tuned on conversations."""
    tasks: list[SuiteTask] = Field(min_length=1)
    """The tasks, in the order of the report."""
    notes: list[str] = Field(default_factory=list)
    """Notes for readers of the numbers; copied to the results."""
