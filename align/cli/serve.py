"""Commands that serve a checkpoint: `chat`, `serve-reward`, `serve-rollout`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.cli.terminal import say
from align.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
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
    chat.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="values for the chat template's own variables, e.g. '{\"enable_thinking\": false}'",
    )
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


def _chat(options: argparse.Namespace) -> None:
    from align.run.checkpoint import require_checkpoint

    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: must be at least 1.")
    variables = template_variables(options.chat_template_kwargs)
    folder = require_checkpoint(options.checkpoint)
    from align.chat import chat

    chat(
        folder,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
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
