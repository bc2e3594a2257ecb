"""Find the tasks that a command names, and report all missing data in one message, before a model is loaded."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError

from align.config.suites import Suite, SuiteTask
from align.errors import UserError
from align.eval.harness_index import Group, HarnessIndex, Leaf, check_yaml, local_dataset
from align.eval.judges.panel import AnyJudge
from align.eval.judges.task import QuestionTask
from align.eval.long_context.task import LongContextTask
from align.eval.own_task import YamlTask, built_in_file
from align.eval.task import Task

SUITES = Path(__file__).parent / "suites"
PREFIX = "suite:"
JUDGED, LONG_CONTEXT = "judged", "long_context"
"""Values of `kind` in YAML files."""
HARNESS_KEYS = {"dataset_path", "output_type", "group", "include", "class", "doc_to_text"}
"""A YAML file with one of these keys is a task of the harness."""


@dataclass
class Wanted:
    """One requested task.

    entry: name or file, and settings. chat: render prompts with the chat template.
    """

    entry: SuiteTask
    chat: bool


@dataclass
class Resolved:
    """Tasks to run.

    tasks: the tasks. groups: groups of the harness whose metrics are aggregated. notes: for the reader of the results.
    """

    tasks: list[Task] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def resolve(
    names: Sequence[str | Task],
    *,
    data: Path | None = None,
    chat: bool = False,
    judges: Sequence[AnyJudge] = (),
    load: bool = True,
    unsafe_code: bool = False,
) -> Resolved:
    """The tasks with these names: of the harness, `suite:NAME`, or files with tasks.

    data: folder of data sets; a task's data set X is read from DATA/X.
    judges: of judged tasks. Without one, a suite's judged tasks are left out with a note.
    load: also load the harness's tasks, which reads their data; otherwise they are only checked.
    unsafe_code: run programs of the model without the sandbox, with a note.
    Raises one `UserError` with all unknown names, or with all missing data sets.
    """
    found = Resolved()
    wanted: list[Wanted] = []
    for name in names:
        if not isinstance(name, str):
            found.tasks.append(name)
        elif name.startswith(PREFIX):
            suite = read_suite(name.removeprefix(PREFIX))
            left_out = [entry.task for entry in suite.tasks if not judges and _kind(entry.task) == JUDGED]
            wanted += [Wanted(entry, chat or suite.chat) for entry in suite.tasks if entry.task not in left_out]
            found.notes += suite.notes
            if left_out:
                found.notes.append(f"{', '.join(left_out)}: left out, because no judge is given; pass --judge")
        else:
            wanted.append(Wanted(SuiteTask(task=name, fixed_shots=False), chat))
    harness: list[tuple[Wanted, Path | None]] = []
    missing: dict[str, None] = {}
    for one in wanted:
        name = one.entry.task
        file = Path(name) if Path(name).suffix in (".py", ".yaml", ".yml") else built_in_file(name)
        if file is None or (file.suffix != ".py" and _is_harness(file)):
            harness.append((one, file))
        elif file.suffix == ".py":
            found.tasks += python_tasks(file)
        elif _kind(name) == LONG_CONTEXT:
            found.tasks.append(LongContextTask.read(file, chat=one.chat))
        else:
            task = (
                QuestionTask(file, judges=judges, data=data)
                if _kind(name) == JUDGED
                else YamlTask(file, data=data, chat=one.chat, shots=one.entry.shots, unsafe_code=unsafe_code)
            )
            if isinstance(task, YamlTask) and task.runs_unsafe_code:
                found.notes.append(f"UNSAFE: {task.name} runs the model's programs with this user's rights, unconfined")
            found.tasks.append(task)
            missing |= dict.fromkeys(task.missing)
    if harness:
        _resolve_harness(harness, data, found, missing, load=load)
    elif missing:
        raise _missing(missing, data)
    _require_distinct(found.tasks)
    if not (found.tasks or harness):
        raise UserError("no tasks are given. Pass --tasks with names, files or suite:NAME.")
    return found


def read_suite(name: str) -> Suite:
    """A suite of `align/eval/suites`, or a file."""
    file = Path(name) if Path(name).suffix in (".yaml", ".yml") else SUITES / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in SUITES.glob("*.yaml")))
        raise UserError(f"suite:{name}: the suite is unknown. Choose one of {known}, or pass a YAML file.")
    check_yaml(file)
    try:
        return Suite.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"{file}: {place}: {problem}. Correct the suite.") from None


def python_tasks(file: Path) -> list[Task]:
    """The `TASK`, or the list `TASKS`, of a Python file."""
    if not file.is_file():
        raise UserError(f"{file}: no such file. Pass a Python file that defines TASK.")
    spec = importlib.util.spec_from_file_location(f"align_task_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code
        raise UserError(
            f"{file}: it cannot be imported ({type(error).__name__}: {error}). Correct the file."
        ) from error
    tasks = getattr(module, "TASKS", None) or [task for task in [getattr(module, "TASK", None)] if task is not None]
    if not tasks:
        raise UserError(f"{file}: it defines neither TASK nor TASKS. Assign a task to TASK.")
    return list(tasks)


def _resolve_harness(
    harness: Sequence[tuple[Wanted, Path | None]],
    data: Path | None,
    found: Resolved,
    missing: dict[str, None],
    *,
    load: bool,
) -> None:
    """Add the harness's tasks. missing: data sets that other tasks lack, for one message with the harness's."""
    from align.eval.harness import HarnessTask, load_leaf, silence

    silence()
    names = [one.entry.task for one, file in harness if file is None]
    files = [file for _, file in harness if file is not None]
    index = HarnessIndex(names, files)
    if unknown := [name for name in names if not index.has(name)]:
        raise UserError(
            f"{', '.join(unknown)}: lm-evaluation-harness has no such task. `lm-eval ls tasks` lists its tasks."
        )
    chosen: list[tuple[Wanted, Leaf]] = []
    for one, file in harness:
        name = _name(file) if file is not None else one.entry.task
        if not index.has(name):
            raise UserError(f"{file}: the harness does not accept it as a task. Set `task` and `output_type`.")
        found.groups += index.groups(name)
        chosen += [(one, leaf) for leaf in index.leaves(name)]
    missing |= dict.fromkeys(problem for _, leaf in chosen if (problem := local_dataset(leaf.dataset, data)[1]))
    if missing:
        raise _missing(missing, data)
    for one, leaf in chosen if load else ():
        entry = one.entry
        found.tasks.append(
            HarnessTask(
                leaf.name,
                load_leaf(index, leaf, data),
                shots=entry.shots,
                fixed_shots=entry.fixed_shots,
                chat=one.chat,
                settings=entry.generation,
            )
        )


def _missing(missing: Iterable[str], data: Path | None) -> UserError:
    commands = [f"`{command}`" for command in missing]
    return UserError(f"--data {data}: {len(commands)} data sets are missing. Run {'; '.join(commands)}.")


def _is_harness(file: Path) -> bool:
    check_yaml(file)
    return bool(HARNESS_KEYS & _keys(file))


def _kind(name: str) -> str:
    """Value of the key `kind` in the YAML file of a task; "" without one."""
    file = Path(name) if Path(name).suffix in (".yaml", ".yml") else built_in_file(name)
    if file is None or not file.is_file():
        return ""
    found = re.search(r"^kind: *(\w+) *$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def _keys(file: Path) -> set[str]:
    return {line.split(":")[0].strip() for line in file.read_text(encoding="utf-8").splitlines() if ":" in line}


def _name(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in ("task", "group") and value.strip():
            return value.strip().strip("\"'")
    return ""


def _require_distinct(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--tasks: {twice[0]} is listed twice, alone or in a suite. Remove one of the two.")
