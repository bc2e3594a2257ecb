"""The command `eval`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from align.cli.parser import add_json, add_verbosity, examples
from align.cli.serve import template_variables
from align.cli.terminal import say, status
from align.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    command = commands.add_parser(
        "eval",
        help="evaluate checkpoints on tasks",
        description="Evaluate checkpoints on tasks of lm-evaluation-harness and on your own, with confidence "
        "intervals. Answers are recorded as they are computed; --resume continues an interrupted evaluation.",
        epilog=examples(
            "align eval runs/quickstart/sft runs/quickstart/ppo --tasks my_task.yaml",
            "align eval before=models/base after=runs/law/sft --tasks suite:quick --out evaluation/law",
            "align eval runs/law/sft --tasks gsm8k --limit 100 --seed 1 --json",
            "align eval runs/tiny/reward_model --pairs pairs.jsonl",
        ),
    )
    command.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help="folder of a checkpoint or of a finished stage; or NAME=FOLDER"
    )
    command.add_argument(
        "--tasks",
        metavar="TASKS",
        help="names of harness tasks, suite:NAME (hunyuan-base, hunyuan-instruct, quick), or .yaml and .py files, "
        "separated by commas",
    )
    command.add_argument(
        "--pairs",
        metavar="FILE",
        help="instead of --tasks: preference pairs, to evaluate reward models by accuracy, bias and calibration",
    )
    command.add_argument("--subset", metavar="COLUMN", help="column with the subset of each pair")
    command.add_argument("--data", type=Path, metavar="DIR", help="folder of data sets; data set X is read from DIR/X")
    command.add_argument(
        "--out", type=Path, default=Path("evaluation"), metavar="DIR", help="folder to write (default: evaluation)"
    )
    command.add_argument("--resume", action="store_true", help="continue; recorded answers are not computed again")
    command.add_argument("--rescore", action="store_true", help="score the recorded answers again, without a model")
    command.add_argument(
        "--backend", choices=("vllm", "hf"), default="vllm", help="engine: vLLM or transformers (default: vllm)"
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, otherwise float32"
    )
    command.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and completion (default: 4096)")
    command.add_argument("--batch-size", type=int, default=64, metavar="N", help="sequences per batch (default: 64)")
    command.add_argument("--cache-gib", type=float, metavar="N", help="size of vLLM's cache in GiB")
    command.add_argument(
        "--limit", type=int, metavar="N", help="documents per task, drawn with the seed (default: all)"
    )
    command.add_argument("--samples", type=int, default=1, metavar="K", help="completions per request (default: 1)")
    command.add_argument("--temperature", type=float, metavar="T", help="override the tasks' temperature")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="override the tasks' maximum")
    command.add_argument("--seed", type=int, default=0, help="seed of the draw and of completions (default: 0)")
    command.add_argument("--chat", action="store_true", help="render prompts with the chat template")
    command.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="with --chat: values for the chat template's own variables, e.g. '{\"enable_thinking\": false}'",
    )
    command.add_argument(
        "--truncate", action="store_true", help="remove the beginning of prompts that are too long, and count them"
    )
    command.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="URL|DIR|FILE",
        help="judge of mt_bench, alignbench, alpaca_eval, arena_hard and your own judged tasks: a server with OpenAI's "
        "chat protocol, a reward model's folder, or a YAML file (docs/judges.md); repeat it for several judges",
    )
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="also evaluate this LoRA adapter of the only CKPT, as a separate model; repeat it for several",
    )
    command.add_argument(
        "--contamination",
        type=Path,
        metavar="RUN",
        help="look for the tasks' items in the training data of this run (or in a data file), and also report the "
        "scores without them",
    )
    command.add_argument(
        "--unsafe-code",
        action="store_true",
        help="run the model's programs with your own rights, without the sandbox",
    )
    command.add_argument("--judge-model", metavar="NAME", help="the model at the judge's URL, if it serves several")
    command.add_argument(
        "--write", choices=("inspect",), help="also write OUT/MODEL/TASK.eval, the logs that `inspect view` shows"
    )
    add_json(command, "print results.json instead of a table")
    add_verbosity(command, "print the table without the progress")
    command.set_defaults(command=run_evaluation)


def run_evaluation(options: argparse.Namespace) -> None:
    from align.config.paths import local_path
    from align.eval.evaluation import Options, evaluate
    from align.eval.inspect_log import write_inspect
    from align.train.quiet import quieten

    _require_positive(options)
    variables = template_variables(options.chat_template_kwargs)
    quieten()
    named = [text.partition("=") for text in options.checkpoints]
    paths = [local_path(path if equals else name) for name, equals, path in named]
    all_named = all(equals for _, equals, _ in named)
    if not all_named and any(equals for _, equals, _ in named):
        raise UserError("checkpoints: some are NAME=FOLDER and some are not. Name all of them or none.")
    names = [name for name, _, _ in named]
    if all_named and len(set(names)) < len(names):
        raise UserError("checkpoints: two have the same name. Pass different names.")
    checkpoints = dict(zip(names, paths)) if all_named else paths
    if (options.tasks is None) == (options.pairs is None):
        raise UserError("align eval: it needs either --tasks or --pairs. Pass one of the two.")
    if options.pairs is not None:
        if options.adapter:
            raise UserError("--adapter: it cannot be used with --pairs. Merge the adapter with `align adapter merge`.")
        _pairs(options, checkpoints, variables)
        return
    if options.unsafe_code:
        print("UNSAFE: programs that the model writes run with your rights, without the sandbox.", file=sys.stderr)
    tasks = [name for part in options.tasks.split(",") if (name := part.strip())]
    results = evaluate(
        checkpoints,
        tasks,
        adapters=_adapters(options.adapter),
        out=options.out,
        resume=options.resume,
        rescore=options.rescore,
        options=Options(
            data=options.data.absolute() if options.data else None,
            backend=options.backend,
            dtype=options.dtype,
            max_length=options.max_length,
            batch_size=options.batch_size,
            cache_gib=options.cache_gib,
            limit=options.limit,
            samples=options.samples,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            chat=options.chat,
            chat_template_kwargs=variables,
            truncate=options.truncate,
            judges=tuple(options.judge),
            judge_model=options.judge_model,
            contamination=options.contamination.absolute() if options.contamination else None,
            unsafe_code=options.unsafe_code,
        ),
        say=(lambda line: None) if options.json else say,
        status=(lambda line: None) if options.json else status,
    )
    logs = write_inspect(results) if options.write == "inspect" else []
    if options.json:
        print(json.dumps(results.content, indent=2, ensure_ascii=False))
    else:
        say("")
        print(results.table())
        print("\n".join(["", *map(str, [options.out / "report.html", *logs])]))


def _adapters(texts: list[str]) -> dict[str, Path]:
    """Folders by name."""
    from align.config.paths import local_path

    found: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--adapter {text}: it has no name. Write NAME=FOLDER.")
        if name in found:
            raise UserError(f"--adapter {text}: two adapters have this name. Pass different names.")
        found[name] = local_path(folder)
    return found


def _pairs(options: argparse.Namespace, checkpoints: dict[str, Path] | list[Path], variables: dict[str, Any]) -> None:
    from align.config.parts import FileSource
    from align.eval.evaluation import named_checkpoints
    from align.eval.opening import default_dtype
    from align.eval.reward_model.score import PAGE, evaluate_pairs

    found = evaluate_pairs(
        named_checkpoints(checkpoints, read=True),
        FileSource(path=options.pairs),
        out=options.out,
        dtype=options.dtype or default_dtype(),
        subset=options.subset,
        limit=options.limit,
        seed=options.seed,
        chat_template_kwargs=variables,
        status=(lambda line: None) if options.json else status,
    )
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        say("")
        print("\n".join([*found["lines"], str(options.out / PAGE)]))


def _require_positive(options: argparse.Namespace) -> None:
    for name in ("max_length", "batch_size", "limit", "samples", "max_new_tokens", "cache_gib"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0. Leave it out for the default.")
    if options.temperature is not None and options.temperature < 0:
        raise UserError(f"--temperature {options.temperature}: must be 0 or above.")
