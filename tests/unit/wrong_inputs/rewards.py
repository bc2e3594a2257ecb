"""Rewards: sections of a recipe, users' functions, servers."""

from __future__ import annotations

import socket
import sys
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from align.config.rewards import CodeReward
from align.reward.code import read_tests
from align.reward.instructions import check_arguments, read_instructions
from align.reward.json_schema import check_schema
from align.reward.process import FunctionProcess, UserFunction
from align.reward.remote import RewardClient
from align.reward.sandbox import sandbox
from align.reward.server import BadRequest, PromptCompletion, RewardServer, Scoring
from align.reward.symbolic import require_math_verify
from align.rl.complete import require_finite_results
from align.rl.update import OVERFLOWS, require_finite_gradients, require_finite_losses

from .here import PORT, Here, wrong


def ppo_stage(*rewards: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "ppo", "prompts": [{"kind": "file", "path": "rows.jsonl"}], "rewards": list(rewards)}


def check(here: Here, *rewards: dict[str, Any]) -> str:
    return here.check(stages={"ppo": ppo_stage(*rewards)})


def run(here: Here, *rewards: dict[str, Any]) -> str:
    return here.run(stages={"ppo": ppo_stage(*rewards)})


def score_with(here: Here, body: str, timeout_s: float = 30.0) -> None:
    here.write("mine.py", f"def score(prompts, completions, rows):\n    {body}\n")
    functions = FunctionProcess()
    try:
        function = UserFunction("mine.py:score", "mine.py", "score", batched=True, timeout_s=timeout_s)
        functions.score(function, ["a", "b"], ["c", "d"], [{}, {}])
    finally:
        functions.close()


@wrong("rewards-of-one-name", "Two rewards under one name")
def _(here: Here) -> str:
    return check(here, {"kind": "regex", "pattern": "a"}, {"kind": "regex", "pattern": "b"})


@wrong("reward-url", "An invalid server URL")
def _(here: Here) -> str:
    return check(here, {"kind": "remote", "url": "localhost:8100"})


@wrong("reward-pattern", "An invalid regular expression")
def _(here: Here) -> str:
    return check(here, {"kind": "regex", "pattern": "(a"})


@wrong("reward-pattern-without-group", "A regular expression without a group to compare")
def _(here: Here) -> str:
    return check(here, {"kind": "regex", "pattern": "is .*", "column": "answer"})


@wrong("reward-lengths-crossed", "A range of lengths that is empty")
def _(here: Here) -> str:
    return check(here, {"kind": "length", "min_tokens": 9, "max_tokens": 8})


@wrong("reward-file-missing", "A missing file of a reward function")
def _(here: Here) -> str:
    said = run(here, {"kind": "function", "path": "mine.py:score"})
    assert not (here.folder / "run" / "base").exists()  # refused before the model was loaded
    return said


@wrong("reward-file-missing-checked", "A missing file of a reward function, in `align check`")
def _(here: Here) -> str:
    return check(here, {"kind": "function", "path": "mine.py:score"})


@wrong("reward-without-function", "A file without the reward function")
def _(here: Here) -> str:
    here.write("mine.py", "x = 1\n")
    said = run(here, {"kind": "function", "path": "mine.py:score"})
    assert not (here.folder / "run" / "ppo").exists()
    return said


@wrong("reward-other-arguments", "A reward function with the wrong arguments")
def _(here: Here) -> str:
    here.write("mine.py", "def score(completions): return [0.0]\n")
    return run(here, {"kind": "function", "path": "mine.py:score"})


@wrong("reward-import-raises", "A file of a reward function that cannot be imported")
def _(here: Here) -> str:
    here.write("mine.py", "import nothing_like_it\n")
    return run(here, {"kind": "function", "path": "mine.py:score"})


@wrong("reward-raises", "A reward function that raises")
def _(here: Here) -> None:
    score_with(here, "return [len(row['answer']) for row in rows]")


@wrong("reward-hangs", "A reward function that hangs")
def _(here: Here) -> None:
    score_with(here, "while True: pass", timeout_s=0.5)


@wrong("reward-ends-its-process", "A reward function that ends its process")
def _(here: Here) -> None:
    score_with(here, "import os; os._exit(7)")


@wrong("reward-wrong-length", "A reward function that returns too few scores")
def _(here: Here) -> None:
    score_with(here, "return [1.0]")


@wrong("reward-not-a-list", "A reward function that does not return a list")
def _(here: Here) -> None:
    score_with(here, "pass")


@wrong("reward-nan", "A reward function that returns a number that is not finite")
def _(here: Here) -> None:
    score_with(here, "return [0.5, float('nan')]")


@wrong("reward-column", "A column that the rows do not have")
def _(here: Here) -> str:
    return run(here, {"kind": "math"})


@wrong("reward-json-two-schemas", "Two schemas for JSON")
def _(here: Here) -> str:
    return check(here, {"kind": "json", "json_schema": {"type": "object"}, "column": "schema"})


@wrong("reward-json-schema", "A schema that is not valid")
def _(here: Here) -> None:
    check_schema({"type": "objekt"})


@wrong("reward-library", "A verifier whose library is not installed")
def _(here: Here) -> None:
    with patch.dict(sys.modules, {"math_verify": None}):
        require_math_verify()


def check_instructions(names: list[str], given: Any) -> None:
    for instruction in read_instructions({"names": names, "kwargs": given}, "names", "kwargs"):
        check_arguments(instruction)


@wrong("reward-instruction-unknown", "A type of instruction without a check")
def _(here: Here) -> None:
    check_instructions(["keywords:rhymes"], [{}])


@wrong("reward-instruction-argument", "An instruction without one of its arguments")
def _(here: Here) -> None:
    check_instructions(["keywords:existence"], [{"keyword": "peace"}])


@wrong("reward-instruction-language", "An instruction to answer in an unknown language")
def _(here: Here) -> None:
    check_instructions(["language:response_language"], [{"language": "klingon"}])


@wrong("reward-instruction-lists", "Other numbers of instructions and arguments")
def _(here: Here) -> None:
    check_instructions(["punctuation:no_comma", "startend:quotation"], [{}])


@wrong("reward-instruction-json", "Arguments of instructions that are not JSON")
def _(here: Here) -> None:
    check_instructions(["punctuation:no_comma"], "[{")


def read_code_tests(cell: Any, **row: Any) -> None:
    read_tests(CodeReward(kind="code"), {"test": cell, **row})


@wrong("reward-code-form", "Tests of a program in an unknown form")
def _(here: Here) -> None:
    read_code_tests({"cases": [1, 2]})


@wrong("reward-code-entry-point", "HumanEval's `check` without the function's name")
def _(here: Here) -> None:
    read_code_tests("def check(candidate):\n    assert candidate(1) == 2\n")


@wrong("reward-code-json", "Tests of a program that start like JSON")
def _(here: Here) -> None:
    read_code_tests('{"inputs": ["1"]')


@wrong("reward-code-no-sandbox", "Programs of a model on a machine that cannot confine them, in `align check`")
def _(here: Here) -> str:
    with patch.object(sandbox, "missing_wall", lambda: "darwin has neither Landlock nor seccomp"):
        return check(here, {"kind": "code"})


@wrong("reward-code-launcher", "A sandbox whose process cannot start")
def _(here: Here) -> None:
    with patch.object(
        sandbox, "BOOT", "import sys; sys.exit('OSError: landlock_restrict_self: Operation not permitted')"
    ):
        sandbox.Sandbox(bubblewrap="").run_program("print(1)")


@wrong("reward-server-down", "A reward server is down", varies=PORT)
def _(here: Here) -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    said = run(here, {"kind": "remote", "url": f"http://127.0.0.1:{port}", "retries": 0})
    assert not (here.folder / "run" / "ppo").exists()
    return said


def score_at_server(scoring: Scoring) -> None:
    """Send two completions to a reward server with this scoring function."""
    with RewardServer("127.0.0.1", 0, scoring, {}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            client = RewardClient(server.url, timeout_s=10, retries=0)
            client.score({"prompts": ["a", "b"], "completions": ["c", "d"]})
        finally:
            server.shutdown()
            thread.join()


@wrong("reward-server-refuses", "A reward server refuses a request", varies=PORT)
def _(here: Here) -> None:
    def refuse(items: list[PromptCompletion]) -> list[float]:
        raise BadRequest("completions must be in Latin")

    score_at_server(refuse)


@wrong("reward-server-wrong-count", "A reward server returns too few scores", varies=PORT)
def _(here: Here) -> None:
    score_at_server(lambda items: [1.0])


@wrong("serve-language-model", "A reward server for a model without a scalar head")
def _(here: Here) -> str:
    return here.align("serve-reward", "model", "--port", "0")


@wrong("serve-port-in-use", "A reward server on a port that is in use", varies=PORT)
def _(here: Here) -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        RewardServer("127.0.0.1", listener.getsockname()[1], lambda items: [], {})
    raise AssertionError("it listened on a port in use")


@wrong("serve-without-tokens", "A reward server with empty micro-batches")
def _(here: Here) -> str:
    return here.align("serve-reward", "model", "--micro-batch-tokens", "0")


@wrong("ppo-loss-not-finite", "A loss of PPO becomes infinite or not a number")
def _(here: Here) -> None:
    require_finite_losses({"policy_loss": 0.5, "value_loss": float("nan")}, step=11)


@wrong("ppo-gradient-not-finite", "A gradient of PPO becomes infinite or not a number")
def _(here: Here) -> None:
    require_finite_gradients("policy", SimpleNamespace(skips_in_a_row=1, skips_overflow=False), step=11)


@wrong("ppo-gradient-overflows", "PPO's bf16 gradients overflow in several steps in a row")
def _(here: Here) -> None:
    require_finite_gradients("policy", SimpleNamespace(skips_in_a_row=OVERFLOWS, skips_overflow=True), step=11)


@wrong("ppo-values-not-finite", "The critic's values become infinite or not a number")
def _(here: Here) -> None:
    values = torch.tensor([[0.5, float("inf")]])
    require_finite_results(SimpleNamespace(rollout_logprobs=torch.zeros(1, 2)), {"values": values})
