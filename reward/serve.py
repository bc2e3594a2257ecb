"""`align serve-reward`: a reward model behind HTTP."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from align.data.chat import tokenizer_fingerprint
from align.reward.model import ModelScorer
from align.reward.server import BadRequest, Question, RewardServer
from align.train.checkpoint import checkpoint_folder
from align.train.quiet import quieten


def serve_reward(
    checkpoint: Path,
    *,
    host: str,
    port: int,
    dtype: str = "float32",
    micro_batch_tokens: int = 4096,
    say: Callable[[str], None] = print,
) -> None:
    """Answer until SIGINT or SIGTERM. Port 0 is any free one; the line that is said first has the address."""
    quieten()
    with build_server(checkpoint, host=host, port=port, dtype=dtype, micro_batch_tokens=micro_batch_tokens) as server:
        say(f"{checkpoint}: scores at {server.url} (POST /score, GET /health)")

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        signal.signal(signal.SIGTERM, before)


def build_server(
    checkpoint: Path, *, host: str = "127.0.0.1", port: int = 0, dtype: str, micro_batch_tokens: int
) -> RewardServer:
    """The server of a reward model's checkpoint, listening but not yet answering."""
    scorer = ModelScorer(checkpoint_folder(checkpoint), dtype, micro_batch_tokens)
    one_at_a_time = threading.Lock()

    def scoring(questions: list[Question]) -> list[float]:
        if not questions:
            return []
        ids = [_token_ids(scorer, question) for question in questions]
        batch = scorer.pad([prompt for prompt, _ in ids], [completion for _, completion in ids])
        if int(batch.lengths.max()) > scorer.max_length:
            raise BadRequest(f"a completion has more than {scorer.max_length} tokens with its prompt")
        with one_at_a_time:
            return scorer(batch).tolist()

    about = {"checkpoint": str(checkpoint), "tokenizer": tokenizer_fingerprint(scorer.tokenizer)}
    return RewardServer(host, port, scoring, about)


def _token_ids(scorer: ModelScorer, question: Question) -> tuple[list[int], list[int]]:
    if isinstance(question.completion, str):
        return scorer.encode(question.prompt, question.completion, question.finished)  # type: ignore[arg-type]
    prompt: list[int] = question.prompt  # type: ignore[assignment]
    vocabulary = scorer.model.config.vocab_size
    if not all(0 <= token < vocabulary for token in prompt + question.completion):
        raise BadRequest(f"token ids must be from 0 to {vocabulary - 1}")
    return prompt, question.completion
