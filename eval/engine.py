"""The sampling engine of an evaluation: on rank 0, shared by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from align.config.rollout import Rollout
from align.data.chat import stop_token_ids
from align.data.prepare import PromptRow
from align.parallel.group import from_rank_0, rank_0_last
from align.parallel.sharding import world
from align.rollout.base import Completion, RolloutEngine, SamplingSettings
from align.rollout.build import build_engine
from align.train.frozen import FrozenModel


class SharedEngine:
    """An engine that rank 0 starts and uses. Its methods, except `close`, are collective: all ranks call them in the
    same order."""

    def __init__(
        self, checkpoint: Path, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, *, dtype: str, seed: int
    ):
        self.seed, self.stop_ids = seed, tuple(stop_token_ids(tokenizer))
        self._engine: RolloutEngine | None = None

        def start() -> None:
            beside_ranks = world()[1] > 1
            self._engine = build_engine(checkpoint, rollout, dtype=dtype, seed=seed, beside_ranks=beside_ranks)

        from_rank_0("evaluate: start the engine", start)

    def update_weights(self, model: FrozenModel, version: int) -> None:
        """Replace the engine's weights by those of `model`, gathered from all ranks."""
        with rank_0_last("evaluate: send the weights"):
            weights = model.published_weights()
            if self._engine is not None:
                self._engine.update_weights(weights, version=version)
            else:
                for _ in weights:  # the gathering is collective
                    pass

    def sample(self, rows: Sequence[PromptRow], *, temperature: float, max_new_tokens: int) -> list[Completion]:
        """One completion per prompt, on every rank."""
        sampling = SamplingSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=self.seed, stop_token_ids=self.stop_ids
        )

        def generate() -> list[Completion]:
            assert self._engine is not None
            return [group[0] for group in self._engine.generate([list(row.ids) for row in rows], sampling)]

        return from_rank_0("evaluate: sample", generate)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
