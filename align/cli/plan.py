"""The command `plan`."""

from __future__ import annotations

import argparse

from align.cli.parser import add_json, add_recipe, examples


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    plan = commands.add_parser(
        "plan",
        help="estimate the memory and time of a recipe on a cluster",
        description="Estimate memory by component, traffic and time of each stage on a cluster before anything starts. "
        "If a stage does not fit, list the smallest changes that make it fit. 1 GB is 1e9 bytes.",
        epilog=examples(
            "align plan my.yaml --gpus 64 --gpu h100",
            "align plan hunyuan-large --model hunyuan-large --gpus 64 --gpu h200 --host-memory 2000",
            "align plan my.yaml --gpus 8 --gpu a100 --stage sft --search --json",
        ),
    )
    add_recipe(plan)
    numbers: list[tuple[str, type, str]] = [
        ("--gpus", int, "GPUs, one process each (default: the recipe's parallel.processes)"),
        ("--hosts", int, "hosts (default: one per eight GPUs)"),
        ("--gpu-memory", float, "memory per GPU in GB"),
        ("--host-memory", float, "memory per host in GB (default: unlimited)"),
        ("--nvme", float, "NVMe per host in GB (default: nothing is offloaded to disk)"),
        ("--reserve", float, "GB per GPU kept free for CUDA, NCCL and fragmentation (default: 4)"),
        ("--tflops", float, "measured TFLOP/s per GPU (default: a share of its peak)"),
        ("--link", float, "measured GB/s per GPU within a host"),
        ("--network", float, "measured GB/s per GPU between hosts"),
        ("--host-link", float, "measured GB/s per GPU to host memory"),
        ("--show", int, "number of settings that --search lists per stage (default: 10)"),
    ]
    for flag, kind, words in numbers:
        plan.add_argument(flag, type=kind, metavar="N", help=words)
    plan.add_argument(
        "--gpu", metavar="NAME", help="GPU model, for its memory and peak rates: a100, h20, h100, h200, ..."
    )
    plan.add_argument(
        "--model",
        metavar="NAME",
        help="preset or folder with the sizes of the recipe's model and of checkpoints not on this machine",
    )
    plan.add_argument("--stage", metavar="STAGE", help="plan only this stage")
    plan.add_argument("--search", action="store_true", help="list the settings that fit, fastest first")
    add_json(plan)
    plan.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from align.config import load_recipe
    from align.plan.command import Options, plan_recipe

    given = {field.name: getattr(options, field.name) for field in fields(Options)}
    flags = Options(**{name: value for name, value in given.items() if value is not None})
    print(plan_recipe(load_recipe(options.recipe, options.overrides), flags))
