"""Commands that serve a checkpoint: `chat`, `serve`, `serve-reward`, `serve-rollout`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.cli.parser import examples
from align.cli.terminal import say
from align.errors import UserError
from align.serve import TOKEN_VARIABLE


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    chat = commands.add_parser(
        "chat",
        help="chat with a checkpoint, an adapter or a server",
        description="Chat with the output of any stage, with a checkpoint folder, or with a server. An empty line or "
        "Ctrl-D ends.",
        epilog=examples(
            "align chat runs/quickstart/ppo",
            'align chat models/base --adapter runs/law/sft --system "Answer in one sentence."',
            "align chat --url http://127.0.0.1:8000 --model law",
        ),
    )
    chat.add_argument(
        "checkpoint", type=Path, nargs="?", help="runs/<run>/<stage>, or a folder with config.json; not with --url"
    )
    chat.add_argument("--adapter", metavar="[NAME=]DIR", help="a LoRA adapter to load onto the checkpoint")
    chat.add_argument("--url", help="address of an OpenAI-compatible server, such as http://127.0.0.1:8000")
    chat.add_argument("--model", help="model or adapter on the server (default: the first that it lists)")
    chat.add_argument("--token-file", type=Path, help=f"file with the server's token (default: ${TOKEN_VARIABLE})")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="maximum tokens per answer (default: 256)")
    chat.add_argument("--temperature", type=float, default=0.7, help="0: greedy decoding (default: 0.7)")
    chat.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    chat.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="values for the chat template's own variables, e.g. '{\"enable_thinking\": false}'",
    )
    chat.set_defaults(command=_chat)

    _add_serve(commands)
    serve_reward = commands.add_parser(
        "serve-reward",
        help="serve a reward model over HTTP",
        description="Serve a reward model's scores at POST /score, for rewards of the kind `remote`.",
        epilog=examples("align serve-reward runs/tiny/reward_model --port 8100"),
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
        epilog=examples("align serve-rollout runs/tiny/sft", "align serve-rollout my.yaml --stage ppo --port 8001"),
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


def template_variables(text: str) -> dict[str, Any]:
    """The value of `--chat-template-kwargs`."""
    try:
        variables = json.loads(text)
    except ValueError:
        variables = None
    if not isinstance(variables, dict):
        raise UserError(
            f"--chat-template-kwargs {text}: it is not a JSON object; write for example "
            "'{\"enable_thinking\": false}'."
        )
    return variables


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a checkpoint and LoRA adapters over HTTP (OpenAI's API)",
        description="Serve a checkpoint and any number of LoRA adapters on it with vLLM, as an OpenAI-compatible "
        "server. Before it accepts requests, each model's log-probabilities are compared with transformers and PEFT.",
        epilog=examples(
            "align serve runs/law/sft",
            "align serve models/base --adapter law=runs/law/sft --adapter tax=runs/tax/sft",
            "align serve models/base --host 0.0.0.0 --token-file token.txt",
        ),
    )
    serve.add_argument("checkpoint", type=Path, help="runs/<run>/<stage>, or a folder with config.json")
    serve.add_argument(
        "--adapter",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="serve the adapter in DIR as the model NAME; may be repeated",
    )
    serve.add_argument("--adapters-dir", type=Path, help="folder to load adapters from while the server runs")
    serve.add_argument("--max-adapters", type=int, help="maximum number of adapters at the same time (default: 8)")
    serve.add_argument("--max-rank", type=int, help="maximum rank of an adapter (default: 16, or that of --adapter)")
    serve.add_argument("--name", help="name of the base model in requests (default: that of its folder)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback needs a token")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000")
    serve.add_argument("--token", help="bearer token of every request; other users of this machine can see it")
    serve.add_argument("--token-file", type=Path, help=f"file with the token (default: ${TOKEN_VARIABLE})")
    serve.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="precision (default: float32)"
    )
    serve.add_argument("--max-model-length", type=int, help="maximum tokens of prompt and completion (default: 4096)")
    serve.add_argument("--max-sequences", type=int, help="maximum number of sequences decoded concurrently")
    serve.add_argument("--cache-gib", type=float, help="GiB of memory for the KV cache")
    serve.add_argument("--tensor-parallel-size", type=int, help="devices per model replica")
    serve.add_argument(
        "--tool-parser", metavar="NAME", help="vLLM's parser for the model's tool calls (default: chosen at startup)"
    )
    serve.add_argument(
        "--drain-seconds", type=int, default=30, help="time for running requests after SIGTERM (default: 30)"
    )
    serve.add_argument(
        "--no-proof",
        action="store_false",
        dest="proof",
        help="skip the comparison with transformers and PEFT, which loads the whole model before vLLM starts",
    )
    serve.set_defaults(command=_serve)


def _serve(options: argparse.Namespace) -> None:
    from align.run.checkpoint import require_checkpoint
    from align.serve.settings import (
        ServeSettings,
        engine_settings,
        model_name,
        named_folders,
        require_name,
        resolved_token,
        served_rank,
    )

    folder = require_checkpoint(options.checkpoint)
    name = options.name or model_name(folder)
    require_name(name, "--name")
    adapters = named_folders(options.adapter, name)
    most = max(8, len(adapters)) if options.max_adapters is None else options.max_adapters
    if most < max(1, len(adapters)):
        raise UserError(f"--max-adapters {most}: must be at least {max(1, len(adapters))}.")
    if options.adapters_dir is not None and not options.adapters_dir.is_dir():
        raise UserError(f"--adapters-dir {options.adapters_dir}: not a folder; create it, or pass another one.")
    if options.drain_seconds < 0:
        raise UserError(f"--drain-seconds {options.drain_seconds}: must be at least 0.")
    token = resolved_token(options.token, options.token_file, options.host)
    keys = ("max_model_length", "max_sequences", "cache_gib", "tensor_parallel_size")
    rollout = engine_settings(folder, {key: getattr(options, key) for key in keys})
    from align.serve.command import adapter_base, largest_rank, serve

    base = adapter_base(folder, options.dtype)
    settings = ServeSettings(
        checkpoint=folder,
        name=name,
        adapters=adapters,
        adapters_dir=options.adapters_dir,
        max_adapters=most,
        max_rank=served_rank(largest_rank(adapters.values(), base), options.max_rank),
        host=options.host,
        port=options.port,
        token=token,
        dtype=options.dtype,
        tool_parser=options.tool_parser,
        drain_seconds=options.drain_seconds,
        proof=options.proof,
        rollout=rollout,
    )
    serve(settings, base)


def _chat(options: argparse.Namespace) -> None:
    from align.run.checkpoint import adapter_folder, require_checkpoint

    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: must be at least 1.")
    variables = template_variables(options.chat_template_kwargs)
    if options.url is not None:
        _chat_with_server(options, variables)
        return
    if options.checkpoint is None:
        raise UserError("chat: there is no model; pass a checkpoint folder, or --url of a server.")
    if options.model is not None:
        raise UserError(f"--model {options.model}: it names a model of a server; pass --url, or leave out --model.")
    folder = require_checkpoint(options.checkpoint)
    adapter = None
    if options.adapter is not None:
        adapter = adapter_folder(Path(options.adapter.rpartition("=")[2]).expanduser())
    from align.chat import chat

    chat(
        folder,
        adapter=adapter,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        variables=variables,
    )


def _chat_with_server(options: argparse.Namespace, variables: dict[str, Any]) -> None:
    from align.serve.client import ChatServer, chat_with_server
    from align.serve.settings import resolved_token

    for flag, given in (("a checkpoint", options.checkpoint), ("--adapter", options.adapter)):
        if given is not None:
            raise UserError(
                f"--url {options.url}: the server has its own models, so {flag} has no effect; leave it out."
            )
    sampling = {"max_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    chat_with_server(
        ChatServer(options.url, resolved_token(None, options.token_file, "localhost")),
        options.model,
        system=options.system,
        sampling=sampling,
        variables=variables,
    )


def _serve_reward(options: argparse.Namespace) -> None:
    from align.config.stage import REWARD_MODEL
    from align.run.checkpoint import read_config, require_checkpoint
    from align.run.refusals import role_problem

    if options.micro_batch_tokens < 1:
        raise UserError(f"--micro-batch-tokens {options.micro_batch_tokens}: must be at least 1.")
    folder = require_checkpoint(options.checkpoint)
    if problem := role_problem(read_config(folder), (REWARD_MODEL,)):
        raise UserError(f"{folder}: {problem}")
    from align.reward.serve import serve_reward

    serve_reward(
        options.checkpoint,
        host=options.host,
        port=options.port,
        dtype=options.dtype,
        micro_batch_tokens=options.micro_batch_tokens,
        say=say,
    )


def _serve_rollout(options: argparse.Namespace) -> None:
    from align.config import load_recipe
    from align.config.paths import local_path
    from align.rollout.serve_stage import serving_stage
    from align.run.checkpoint import require_checkpoint

    target = local_path(options.target)
    if target.is_dir():
        require_checkpoint(target)
    else:
        serving_stage(load_recipe(target), str(target), options.stage)
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
