"""Built-in tasks. Each module of this folder defines one task, `TASK`; to add a task, add a file.

Recipes use a task by its name: `tasks: [{name: gsm8k}]`.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from align.eval.task import PromptTask


@cache
def built_in_tasks() -> dict[str, PromptTask]:
    """The `TASK` of every module in this folder, by its name."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {module.TASK.name: module.TASK for module in modules}
