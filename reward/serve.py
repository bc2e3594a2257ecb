"""`align serve-reward`: serve a reward model over HTTP."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from align.data.chat import tokenizer_fingerprint
from align.reward.model import ModelScorer
from align.reward.server import BadRequest, PromptCompletion, RewardServer
from align.run.checkpoint import checkpoint_folder
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
    """Serve until SIGINT or SIGTERM. Port 0 selects a free port; the first line of output has the address."""
    quieten()
    with build_server(checkpoint, host=host, port=port, dtype=dtype, micro_batch_tokens=micro_batch_tokens) as server:
        say(f"serving {checkpoint} at {server.url} (POST /score, GET /health)")

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        signal.signal(signal.SIGTERM, before)


def build_server(
    checkpoint: Path, *, host: str = "127.0.0.1", port: int = 0, dtype: str, micro_batch_tokens: int
) -> RewardServer:
    """Server of a reward model's checkpoint; it listens, and responds after `serve_forever` is called."""
    scorer = ModelScorer(checkpoint_folder(checkpoint), dtype, micro_batch_tokens)
    one_at_a_time = threading.Lock()

    def score(items: list[PromptCompletion]) -> list[float]:
        if not items:
            return []
        ids = [_token_ids(scorer, item) for item in items]
        batch = scorer.pad([prompt for prompt, _ in ids], [completion for _, completion in ids])
        if int(batch.lengths.max()) > scorer.max_length:
            raise BadRequest(f"a completion has more than {scorer.max_length} tokens with its prompt")
        with one_at_a_time:
            return scorer.scores(batch).tolist()

    about = {"checkpoint": str(checkpoint), "tokenizer": tokenizer_fingerprint(scorer.tokenizer)}
    return RewardServer(host, port, score, about)


def _token_ids(scorer: ModelScorer, item: PromptCompletion) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion; raises BadRequest for ids outside the vocabulary."""
    if isinstance(item.completion, str):
        return scorer.encode(item.prompt, item.completion, item.finished, item.variables)  # type: ignore[arg-type]
    prompt: list[int] = item.prompt  # type: ignore[assignment]
    vocabulary = scorer.model.config.vocab_size
    if not all(0 <= token < vocabulary for token in prompt + item.completion):
        raise BadRequest(f"token ids must be from 0 to {vocabulary - 1}")
    return prompt, item.completion
