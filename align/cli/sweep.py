"""The command `sweep`: a recipe with several settings and seeds."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from align.cli.parser import add_json, add_recipe, examples
from align.cli.terminal import say, width
from align.errors import UserError
from align.run import interrupt

if TYPE_CHECKING:
    from align.config.recipe import Recipe
    from align.sweep.plan import Plan
    from align.sweep.search import OptunaSearch


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    sweep = commands.add_parser(
        "sweep",
        help="run a recipe with several settings and seeds",
        description="Run a recipe with every combination of some settings and with several seeds. Equal stages run "
        "once. The report names the best setting with its margin, or says that none is clearly best.",
        epilog=examples(
            "align sweep tiny stages.dpo.beta=0.05,0.1,0.3 --seeds 3",
            "align sweep my.yaml stages.sft.optimizer.learning_rate=1e-4,3e-4 stages.sft.epochs=1,2 --dry-run",
            "align sweep my.yaml stages.dpo.beta=0.01..1:log --search tpe --trials 20 --metric dpo/scores",
        ),
    )
    add_recipe(sweep)
    sweep.add_argument("--seeds", type=int, default=1, metavar="N", help="runs per combination (default: 1)")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="folder of the sweep (default: sweeps/<name>)")
    sweep.add_argument(
        "--resume", action="store_true", help="continue an earlier sweep, also with more values or seeds"
    )
    sweep.add_argument("--dry-run", action="store_true", help="print how often each stage would run, and run nothing")
    sweep.add_argument(
        "--metric",
        metavar="MODEL/KEY",
        help="metric that ranks the settings, e.g. dpo/scores or dpo/eval_loss (default: the first one of the "
        "last evaluated model that the settings affect)",
    )
    direction = sweep.add_mutually_exclusive_group()
    direction.add_argument(
        "--maximize", action="store_const", dest="better", const=1, default=0, help="higher is better"
    )
    direction.add_argument("--minimize", action="store_const", dest="better", const=-1, help="lower is better")
    sweep.add_argument(
        "--search", choices=("tpe", "random"), help="draw combinations with optuna instead of running all of them"
    )
    sweep.add_argument("--trials", type=int, metavar="N", help="with --search: number of combinations")
    add_json(sweep, "print the sweep's report.json at the end instead of its table")
    sweep.set_defaults(command=run_command)


def run_command(options: argparse.Namespace) -> None:
    from align.config import load_recipe
    from align.sweep.axes import Range, read_settings
    from align.sweep.plan import Plan, plan_lines
    from align.sweep.runner import Settings, run_sweep, start_run
    from align.sweep.text import sweep_lines

    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: must be at least 1. Pass the number of runs per setting.")
    fixed, axes = read_settings(options.overrides)
    recipe = load_recipe(options.recipe, fixed)
    if options.metric is not None:
        _require_model(recipe, options.metric)
    plan = Plan(options.recipe, fixed, recipe, axes, options.seeds)
    folder = options.out or Path("sweeps") / recipe.name
    search = None
    if options.search is None:
        if options.trials is not None:
            raise UserError(f"--trials {options.trials}: it needs --search; add --search tpe.")
        if ranges := [axis.key for axis in axes if isinstance(axis, Range)]:
            raise UserError(f"'{ranges[0]}': a range of numbers needs --search tpe; or write the values with commas.")
    else:
        search = _search(options, plan)
    if options.dry_run:
        points = plan.grid() if search is None else [plan.point(search.ask(), [])]
        print("\n".join(plan_lines([run for point in points for run in plan.runs(point, folder)])))
        return
    trials = (options.search, options.trials) if options.search is not None else None
    with interrupt.listening():
        failed = run_sweep(
            plan,
            folder,
            Settings(options.metric, options.better, trials),
            search=search,
            resume=options.resume,
            start=partial(start_run, output=sys.stderr if options.json else None),
            say=(lambda line: print(line, file=sys.stderr)) if options.json else say,
        )
    text = (folder / "report.json").read_text(encoding="utf-8")
    if options.json:
        print(text, end="")
    else:
        for line in [*sweep_lines(json.loads(text), width()), f"report: {folder / 'report.html'}"]:
            say(line)
    if failed:
        words = "1 run has failed" if len(failed) == 1 else f"{len(failed)} runs have failed"
        raise UserError(
            f"{folder}: {words}: {', '.join(failed)}. The messages are above; start the sweep again with --resume to "
            "repeat what has failed."
        )


def _require_model(recipe: Recipe, metric: str) -> None:
    """Raise `UserError` if a metric is of no stage of the recipe and of no model that it evaluates."""
    from align.config.recipe import BASE
    from align.config.stages import EvaluateStage

    evaluated = [
        model for stage in recipe.stages.values() if isinstance(stage, EvaluateStage) for model in stage.models
    ]
    names = dict.fromkeys([BASE, *recipe.stages, *evaluated])
    if not any(metric.startswith(f"{name}/") for name in names):
        raise UserError(f"--metric {metric}: not of the form MODEL/KEY with one of the models {', '.join(names)}.")


def _search(options: argparse.Namespace, plan: Plan) -> OptunaSearch:
    from align.sweep.results import direction
    from align.sweep.search import OptunaSearch

    if not plan.axes:
        raise UserError(
            f"--search {options.search}: no setting has a range or several values; write, for example, "
            "stages.dpo.beta=0.01..1."
        )
    if options.trials is None or options.trials < 1:
        raise UserError(f"--search {options.search}: it needs a number of trials; add, for example, --trials 20.")
    if options.metric is None:
        raise UserError(f"--search {options.search}: it needs a metric; add, for example, --metric dpo/scores.")
    better = options.better or direction(options.metric)
    if not better:
        raise UserError(
            f"--metric {options.metric}: whether higher or lower is better is not known; add --maximize or --minimize."
        )
    return OptunaSearch(options.search, plan.axes, better, plan.recipe.seed)
