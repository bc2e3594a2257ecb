"""All cases of wrong input, by name, in the order of docs/errors.md."""

from __future__ import annotations

from . import (  # noqa: F401 (importing a module registers its cases)
    adapters,
    checkpoints,
    command_line,
    data,
    eval_command,
    evaluation,
    generation,
    judged_tasks,
    judging,
    long_context,
    lora,
    own_tasks,
    planning,
    recipes,
    rewards,
    run_folder,
    serving,
    several,
    sweeps,
    templates,
)
from .here import CASES, SECTIONS, Case

BY_SECTION: dict[str, list[Case]] = {
    title: [case for module in modules for case in CASES.values() if case.module == module]
    for title, modules in SECTIONS.items()
}
ALL = {case.name: case for cases in BY_SECTION.values() for case in cases}
assert len(ALL) == len(CASES), "a module with cases has no section"
