"""Commands on recipes and runs: `run`, `check`, `show`, `report`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from align.cli.parser import add_json, add_recipe, add_verbosity, examples
from align.cli.terminal import progress, say, status, width
from align.errors import UserError
from align.run import interrupt


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    run = commands.add_parser(
        "run",
        help="run a recipe's stages",
        description="Run the stages of a recipe in order. Finished stages are kept. SIGTERM or one Ctrl-C stops the "
        "run with a checkpoint.",
        epilog=examples(
            "align run tiny",
            "align run my.yaml stages.dpo.beta=0.2 --run-dir runs/beta-0.2",
            "align run my.yaml --resume",
            "align run my.yaml --nproc 4",
        ),
    )
    add_recipe(run)
    run.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/<name>)")
    run.add_argument("--resume", action="store_true", help="continue an interrupted stage from its last checkpoint")
    run.add_argument("--only", metavar="STAGE", help="run only this stage (again, if it is finished)")
    run.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and all later ones again")
    add_verbosity(run, "print errors only")
    run.set_defaults(command=run_recipe)

    check = commands.add_parser(
        "check",
        help="validate recipes",
        description="Validate recipes, check that their files exist and print the parameters that LoRA trains, without "
        "loading torch.",
        epilog=examples(
            "align check my.yaml",
            "align check my.yaml --nproc 8 --data",
            "align check recipes/*.yaml --without-files --json",
        ),
    )
    check.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="YAML files or shipped recipes; an argument key.subkey=value overrides that key in all of them",
    )
    add_json(check)
    check.add_argument("--quiet", "-q", action="store_true", help="print problems only")
    check.add_argument(
        "--without-files",
        action="store_true",
        help="do not check that data, rewards and checkpoints exist on this machine",
    )
    check.add_argument(
        "--data",
        action="store_true",
        help="also tokenise the data of every stage and print its counts (see `align data show`), and count the "
        "parameters that LoRA trains in families other than HunYuan; loads torch",
    )
    check.set_defaults(command=_check)
    for command in (run, check):
        command.add_argument("--nproc", type=int, metavar="N", help="number of processes; same as parallel.processes=N")
        command.add_argument("--hostfile", metavar="FILE", help="machines of the run; one process per slot")

    show = commands.add_parser(
        "show",
        help="print a recipe with all defaults",
        description="Print a recipe with its defaults and overrides applied.",
        epilog=examples("align show tiny", "align show my.yaml stages.sft.lora.rank=8 --json"),
    )
    add_recipe(show)
    add_json(show, "print JSON instead of YAML")
    show.set_defaults(command=_show)

    report = commands.add_parser(
        "report",
        help="rewrite the report of a run, a sweep or an evaluation",
        description="Write report.json, report.md and report.html in the folder of a run or a sweep, or results.md and "
        "report.html in the folder of an evaluation.",
        epilog=examples("align report runs/tiny", "align report runs/tiny --json"),
    )
    report.add_argument("run_dir", type=Path, help="folder of a run, a sweep or an evaluation")
    add_json(report, "print report.json instead of the paths")
    report.set_defaults(command=_report)


def run_recipe(options: argparse.Namespace) -> None:
    from align import pipeline
    from align.config import load_recipe

    overrides = [*options.overrides, *process_overrides(options, options.overrides)]
    recipe = load_recipe(options.recipe, overrides)
    run_dir = options.run_dir or Path("runs") / recipe.name
    which = {"resume": options.resume, "only": options.only, "start": options.start}
    if recipe.parallel is not None:
        from align.launch import processes

        if not processes.is_rank():
            pipeline.refuse_early(recipe, run_dir, **which)
            processes.start(run_command(options, overrides), recipe.parallel, run_dir / "logs")
            return
    with interrupt.listening():
        pipeline.run(recipe, run_dir, **which, say=say, status=status, progress=progress, width=width())


def process_overrides(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    """--nproc and --hostfile as overrides of the recipe. parallel.processes defaults to the hostfile's sum of slots."""
    found = [] if options.nproc is None else [f"parallel.processes={options.nproc}"]
    if options.hostfile is not None:
        found.append(f"parallel.hostfile={options.hostfile}")
        if not any(override.startswith("parallel.processes=") for override in [*overrides, *found]):
            from align.launch.processes import read_hostfile

            found.append(f"parallel.processes={sum(read_hostfile(Path(options.hostfile)).values())}")
    return found


def run_command(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The arguments of `align` that start the same run again."""
    words = ["run", options.recipe, *overrides]
    for flag, value in (("--run-dir", options.run_dir), ("--only", options.only), ("--from", options.start)):
        words += [flag, str(value)] if value is not None else []
    return [*words, "--resume"] if options.resume else words


def _check(options: argparse.Namespace) -> None:
    overrides = [value for value in options.recipes if "=" in value]
    recipes = [value for value in options.recipes if "=" not in value]
    if not recipes:
        raise UserError("the command has overrides but no recipe; add the name or file of a recipe.")
    problems = {path: _problems(path, overrides, options) for path in recipes}
    if options.quiet and not options.json:
        print("".join(f"{problem}\n" for problem in problems.values() if problem), end="", file=sys.stderr)
    elif options.json:
        print(json.dumps({path: {"ok": p is None, "error": p} for path, p in problems.items()}, indent=2))
    else:
        for path, problem in problems.items():
            print(problem if problem else f"{path}: ok", file=sys.stderr if problem else sys.stdout)
            for line in [] if problem else _adapter_lines(path, overrides, loads_torch=options.data):
                print(line)
            if options.data and not problem:
                for line in _data_lines(path, overrides):
                    print(line, flush=True)
    if any(problems.values()):
        sys.exit(2)


def _problems(path: str, overrides: list[str], options: argparse.Namespace) -> str | None:
    """The problems of one recipe, one per line; None if it has none."""
    from align.config import load_recipe
    from align.config.recipe import BASE
    from align.preflight import problems

    try:
        overrides = [*overrides, *process_overrides(options, overrides)]
    except UserError as error:  # an error in the hostfile does not name the recipe
        return f"{path}: {error}"
    try:
        recipe = load_recipe(path, overrides)
    except UserError as error:
        return str(error)
    found = problems(recipe, [BASE, *recipe.stages], files=not options.without_files)
    return "\n".join(f"{path}: {problem}" for problem in found) or None


def _adapter_lines(path: str, overrides: list[str], *, loads_torch: bool) -> Iterator[str]:
    """Trained parameters by group of each stage with adapters, and the consequences for serving."""
    from align.config import load_recipe
    from align.plan.job import adapted_models
    from align.plan.sizes import is_counted_with_torch

    for name, role, shape, lora, scorer in adapted_models(load_recipe(path, overrides), loads_torch=loads_torch):
        counted = shape is not None and (loads_torch or not is_counted_with_torch(lora))
        groups = shape.trained_groups(lora, scorer=scorer) if shape is not None and counted else {}
        counts = ", ".join(f"{group} {count:,}" for group, count in groups.items())
        share = f" ({sum(groups.values()) / shape.parameters(scorer=scorer):.2%})" if groups and shape else ""
        counts = counts or ("adapters" if loads_torch else "adapters (--data counts them, and loads torch)")
        yield f"  {name}: {role} trains {counts}{share}"
        if lora.quantize:
            yield f"  {name}: the {role}'s attention, MLPs and routed experts are held in 4 bits ({lora.quantize})"
        if lora.train_router and (not groups or "router" in groups):
            size = "" if shape is None else f" ({shape.parameters() * 2 / 1e6:,.0f} MB in bf16)"
            yield (
                f"  {name}: the {role}'s router is trained, so the adapter cannot be served beside its base, only "
                f"merged: a whole model{size}"
            )


def _data_lines(path: str, overrides: list[str]) -> Iterator[str]:
    """Lines of counts of each stage that reads rows. Raises `UserError` for data that cannot be used."""
    from align.config import load_recipe
    from align.config.parts import StageSource
    from align.config.stage import find
    from align.config.stages import EvaluateStage

    recipe = load_recipe(path, overrides)
    from align.recipes.preview import count_preferences, has_rows, preview

    run_dir = Path("runs") / recipe.name
    for name, stage in recipe.stages.items():
        made = [source.stage for _, source in find(stage, StageSource)]
        waiting = [parent for parent in made if not (run_dir / parent / "data" / "train.jsonl").is_file()]
        if waiting:
            yield f"  {name}: its rows are made by stage '{waiting[0]}', which has not been run"
            continue
        if has_rows(stage):
            found = preview(recipe, name, run_dir, progress)
            assert found.report is not None
            yield f"  {name}: {'first rows of a stream: ' if found.streams else ''}{found.report.summary()}"
        if isinstance(stage, EvaluateStage) and stage.preferences:
            counts = count_preferences(recipe, name, run_dir, progress)
            dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in counts.dropped.items())
            yield f"  {name}: preferences: {counts.rows_read:,} rows read: {counts.rows_train:,} pairs{dropped}"
        if isinstance(stage, EvaluateStage) and stage.tasks:
            yield f"  {name}: the rows of its tasks are not counted"


def _show(options: argparse.Namespace) -> None:
    from align.config import load_recipe

    values = load_recipe(options.recipe, options.overrides).model_dump(mode="json")
    if options.json:
        print(json.dumps(values, indent=2))
    else:
        from align.config.load import dump

        print(dump(values), end="")


def _report(options: argparse.Namespace) -> None:
    if (options.run_dir / "results.json").is_file() and not (options.run_dir / "recipe.json").is_file():
        from align.eval.results import Results

        results = Results.read(options.run_dir)
        results.write()
        print(json.dumps(results.content, indent=2) if options.json else options.run_dir / "report.html")
        return
    if (options.run_dir / "sweep.json").is_file():
        from align.sweep.results import write_sweep_report

        paths = write_sweep_report(options.run_dir)
        print(paths[0].read_text(encoding="utf-8") if options.json else "\n".join(map(str, paths)))
        return
    if not (options.run_dir / "recipe.json").is_file():
        raise UserError(f"{options.run_dir}: it has no recipe.json; pass the folder that `align run` wrote.")
    from align.eval.report.write import write_report

    paths = write_report(options.run_dir)
    if options.json:
        print((options.run_dir / "report.json").read_text(encoding="utf-8"))
    else:
        print("\n".join(str(path) for path in paths))
