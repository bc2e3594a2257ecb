"""Commands on LoRA adapters: `adapter info`, `check`, `merge`, `unmerge`, `extract` and `combine`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_json, examples
from align.errors import UserError

if TYPE_CHECKING:
    from align.models.lora.build import Errors
    from align.models.lora.stream import MergeReport

METHODS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    adapter = commands.add_parser(
        "adapter",
        help="inspect, check, merge and make LoRA adapters",
        description="Inspect, check, merge and make LoRA adapters in PEFT's format.",
    )
    kinds = adapter.add_subparsers(required=True, metavar="COMMAND")
    info = kinds.add_parser(
        "info",
        help="print an adapter's base model and size",
        description="Print an adapter's base model, the size of each group, and whether `align serve` can serve it "
        "without merging.",
        epilog=examples("align adapter info runs/law/sft", "align adapter info adapters/law --base models/base --json"),
    )
    _adapter_argument(info)
    add_json(info)
    info.set_defaults(command=_info)
    check = kinds.add_parser(
        "check",
        help="check an adapter against its base model",
        description="Check that an adapter is complete, finite and fits its base model, without loading the base.",
        epilog=examples(
            "align adapter check runs/law/sft", "align adapter check adapters/law --base models/base --json"
        ),
    )
    _adapter_argument(check)
    add_json(check)
    check.set_defaults(command=_check)
    merge = kinds.add_parser(
        "merge",
        help="merge an adapter into its base model",
        description="Write the base model with the adapter merged. Files are processed one after another, so models "
        "larger than the memory can be merged.",
        epilog=examples("align adapter merge runs/law/sft models/law"),
    )
    _adapter_argument(merge)
    merge.add_argument("target", type=Path, help="folder to write")
    add_json(merge)
    merge.set_defaults(command=_merge, remove=False)
    unmerge = kinds.add_parser(
        "unmerge",
        help="subtract an adapter from a merged model",
        description="Subtract a merged adapter from a model. The result differs from the original "
        "by rounding; prefer the original base model if you have it.",
        epilog=examples("align adapter unmerge runs/law/sft models/law models/base-again"),
    )
    unmerge.add_argument("adapter", type=Path, help="the adapter's folder, or that of the stage that trained it")
    unmerge.add_argument("base", type=Path, metavar="model", help="the folder of the merged model")
    unmerge.add_argument("target", type=Path, help="folder to write")
    add_json(unmerge)
    unmerge.set_defaults(command=_merge, remove=True)
    extract = kinds.add_parser(
        "extract",
        help="make an adapter from the difference of two models",
        description="Approximate the difference of two checkpoints by an adapter (singular value decomposition), and "
        "print the error by rank.",
        epilog=examples("align adapter extract models/base models/tuned adapters/tuned --rank 32"),
    )
    extract.add_argument("base", type=Path, help="the folder of the base model")
    extract.add_argument("tuned", type=Path, help="the folder of the trained model")
    extract.add_argument("target", type=Path, help="folder to write")
    extract.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: 16)")
    extract.add_argument(
        "--copy-rest",
        action="store_true",
        help="store embeddings, head, norms and routers that differ in full; without this their change is lost",
    )
    add_json(extract)
    extract.set_defaults(command=_extract)
    combine = kinds.add_parser(
        "combine",
        help="make one adapter from several",
        description="Combine adapters of one base model into one. `linear` adds them exactly unless --rank is set.",
        epilog=examples(
            "align adapter combine adapters/law adapters/tax --target adapters/both",
            "align adapter combine a b --target c --method ties --density 0.5 --weights 1 0.5",
        ),
    )
    combine.add_argument("adapters", type=Path, nargs="+", metavar="adapter", help="folders of two or more adapters")
    combine.add_argument("--target", type=Path, required=True, help="folder to write")
    combine.add_argument("--weights", type=float, nargs="+", help="one weight per adapter (default: 1 each)")
    combine.add_argument("--method", choices=METHODS, default="linear", help="default: linear")
    combine.add_argument("--density", type=float, help="fraction of the values that the other methods keep")
    combine.add_argument("--rank", type=int, help="rank of the result")
    combine.add_argument("--base", type=Path, help="the base model (default: the one that the adapter names)")
    add_json(combine)
    combine.set_defaults(command=_combine)


def _adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="the adapter's folder, or that of the stage that trained it")
    parser.add_argument("--base", type=Path, help="the base model (default: the one that the adapter names)")


def _base(adapter: Path, base: Path | None) -> tuple[Path, Any]:
    """The folder of the base model and its configuration."""
    from align.models.lora.folder import read_adapter
    from align.run.adapted import POINTER, base_of
    from align.run.checkpoint import checkpoint_folder
    from align.train.checkpoint import check_checkpoint, checked_config

    if base is None and (adapter / POINTER).is_file():
        base = base_of(adapter)
    if base is None:
        named = read_adapter(adapter).settings.get("base_model_name_or_path")
        if not named or not Path(named).is_dir():
            found = f"its base model '{named}' is not a folder here" if named else "it does not name its base model"
            raise UserError(f"{adapter}: {found}; pass the folder with --base.")
        base = Path(named)
    base = checkpoint_folder(base)
    return base, checked_config(check_checkpoint(base), str(base), "restore the published value")


def _new_folder(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: it exists and is not an empty folder; pass a new one.")


def _info(options: argparse.Namespace) -> None:
    from align.models.lora.describe import group_rows, table_lines
    from align.models.lora.folder import changes, read_adapter, serving_problems, skeleton
    from align.run.adapted import trained_on
    from align.run.checkpoint import adapter_folder

    folder = adapter_folder(options.adapter)
    adapter = read_adapter(folder)
    base, config = _base(folder, options.base)
    bones = skeleton(config, scorer=adapter.settings.get("task_type") == "SEQ_CLS")
    found = changes(adapter, bones)
    rows = group_rows(found, bones)
    quantized = trained_on(folder)
    problems = list(serving_problems(found, adapter, bones))
    if options.json:
        settings = {name: adapter.settings.get(name) for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
        groups = [row._asdict() for row in rows]
        values = {"base": str(base), "quantize": quantized, **settings, "groups": groups, "not_served": problems}
        print(json.dumps(values, indent=2))
        return
    print(f"base model: {base}" + (f", in 4 bits ({quantized}) while the adapter was trained" if quantized else ""))
    print("\n".join(table_lines(rows)))
    print(f"align serve: {'; '.join(problems) + '. Merge it to serve it.' if problems else 'can serve it'}")


def _check(options: argparse.Namespace) -> None:
    from align.models.lora.folder import changes, read_adapter, require_finite_adapter, serving_problems, skeleton
    from align.run.adapted import require_base
    from align.run.checkpoint import adapter_folder

    folder = adapter_folder(options.adapter)
    adapter = read_adapter(folder)
    base, config = _base(folder, options.base)
    bones = skeleton(config, scorer=adapter.settings.get("task_type") == "SEQ_CLS")
    found = changes(adapter, bones)
    require_base(folder, base)
    require_finite_adapter(adapter)
    problems = list(serving_problems(found, adapter, bones))
    if options.json:
        values = {"adapter": str(folder), "base": str(base), "parameters": len(found), "not_served": problems}
        print(json.dumps(values, indent=2))
        return
    print(f"{folder}: fits {base}, {len(found)} parameters change")
    for problem in problems:
        print(f"  `align serve` cannot serve it beside its base: {problem}; merge it with `align adapter merge`")


def _merge(options: argparse.Namespace) -> None:
    from align.run.checkpoint import adapter_folder

    _new_folder(options.target)
    folder = adapter_folder(options.adapter)
    base, config = _base(folder, options.base)
    from align.models.lora.stream import merge_adapter

    report = merge_adapter(base, config, folder, options.target, remove=options.remove)
    if options.json:
        values = {"target": str(options.target), "changed": report.changed, "copied": report.copied}
        print(json.dumps({**values, "relative_rounding": report.relative_rounding}, indent=2))
        return
    print(f"{options.target}: {report.changed} tensors changed, {report.copied} copied")
    for line in _rounding_lines(report, options.remove):
        print(line)


def _rounding_lines(report: MergeReport, remove: bool) -> list[str]:
    lines = []
    if report.relative_rounding:
        stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in report.dtypes))
        lines.append(f"rounding to {stored} changed the update by {report.relative_rounding:.2%} of its norm")
    if remove:
        lines.append("the result differs from the original by the rounding of two merges; the original is exact")
    return lines


def _extract(options: argparse.Namespace) -> None:
    _new_folder(options.target)
    if options.rank < 1:
        raise UserError(f"--rank {options.rank}: a rank must be at least 1; pass a positive number.")
    base, config = _base(options.target, options.base)
    tuned, other = _base(options.target, options.tuned)
    if config.model_type != other.model_type:
        raise UserError(
            f"{tuned}: its model_type is '{other.model_type}', but that of {base} is '{config.model_type}'; pass two "
            "models of one family."
        )
    from align.models.lora.build import extract_adapter

    errors, rest = extract_adapter(base, tuned, config, options.target, options.rank, copy_rest=options.copy_rest)
    if options.json:
        lost = {} if options.copy_rest else rest
        values = {"target": str(options.target), "errors": _error_values(errors), "lost": lost}
        print(json.dumps(values, indent=2))
        return
    print(f"{options.target}: rank {options.rank}; norm of the error, relative to the difference of the group:")
    _print_errors(errors)
    for group, share in rest.items():
        stored = "stored in full" if options.copy_rest else "lost (--copy-rest stores it)"
        print(f"{group:<16}{share:.1%} of the whole difference, {stored}")


def _error_values(errors: Errors) -> dict[str, dict[int, float]]:
    """{group: {rank: norm of the error, relative to that of the group's update}}."""
    return {group: {rank: error.relative(rank) for rank in error.left} for group, error in errors.items()}


def _print_errors(errors: Errors) -> None:
    for group, error in errors.items():
        values = "  ".join(f"rank {rank}: {error.relative(rank):.1%}" for rank in error.left)
        print(f"{group:<16}{values}")


def _combine(options: argparse.Namespace) -> None:
    from align.run.checkpoint import adapter_folder

    _new_folder(options.target)
    folders = [adapter_folder(path) for path in options.adapters]
    weights = options.weights or [1.0] * len(folders)
    if len(folders) < 2:
        raise UserError("adapter combine: it needs at least two adapters; pass their folders.")
    if len(weights) != len(folders):
        raise UserError(f"--weights: there are {len(weights)} for {len(folders)} adapters; pass one for each.")
    if options.method != "linear" and options.density is None:
        raise UserError(f"--method {options.method}: it removes values; pass the fraction to keep with --density.")
    if options.density is not None and (options.method == "linear" or not 0 < options.density <= 1):
        raise UserError(f"--density {options.density:g}: it is a fraction above 0, for every method but linear.")
    if options.rank is not None and options.rank < 1:
        raise UserError(f"--rank {options.rank}: a rank must be at least 1; pass a positive number.")
    base, config = _base(folders[0], options.base)
    from align.models.lora.build import combine_adapters

    errors = combine_adapters(
        folders,
        weights,
        config,
        options.target,
        base,
        method=options.method,
        density=options.density or 1.0,
        rank=options.rank,
    )
    if options.json:
        print(json.dumps({"target": str(options.target), "errors": _error_values(errors or {})}, indent=2))
        return
    print(options.target)
    if errors:
        print("norm of the error, relative to the combined update of the group:")
        _print_errors(errors)
