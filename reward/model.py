"""Score completions with a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.parallel import Parallel
from align.data.chat import encode_answer, encode_prompt, end_of_turn_id
from align.data.experience import Experience, build_experience
from align.errors import UserError
from align.models.forward import sequence_scores
from align.models.lora.adapters import AnyModel
from align.models.shared_weights import SharedWeights
from align.parallel.micro_batches import shared_passes, summed
from align.train.checkpoint import load_reward_model, load_tokenizer
from align.train.device import training_device
from align.train.frozen import FrozenModel


class ModelScorer:
    """A reward model with its tokenizer. With `parallel`, the model is sharded and its calls are collective.

    shared: as in `load_policy`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        micro_batch_tokens: int,
        parallel: Parallel | None = None,
        shared: SharedWeights | None = None,
    ):
        self.tokenizer = load_tokenizer(folder)
        self.device = training_device()
        self.model: AnyModel = load_reward_model(folder, dtype, parallel, shared).to(self.device)
        self._frozen = FrozenModel(self.model, parallel, dtype)
        self.max_length = int(self.model.config.max_position_embeddings)
        self._end = end_of_turn_id(self.tokenizer)
        self._folder, self._micro_batch_tokens = folder, micro_batch_tokens

    @torch.no_grad()
    def scores(self, batch: Experience) -> Tensor:
        """Scores [B], returned on every rank. Each rank scores its share of the micro-batches.

        Raises UserError if a sequence is longer than the model's context.
        """
        longest = int(batch.lengths.max())
        if longest > self.max_length:
            raise UserError(
                f"reward model {self._folder}: a prompt and completion of {longest} tokens exceed the model's "
                f"max_position_embeddings {self.max_length}. Lower rollout.max_model_length, or use another model."
            )
        scores = torch.zeros(len(batch))
        micros = list(batch.micro_batches(torch.arange(len(batch)), self._micro_batch_tokens))
        for micro, counts in shared_passes(micros):
            found = self._frozen.run(sequence_scores, batch.rows(micro).to(self.device)).cpu()
            if counts:
                scores[micro] = found
        return summed(scores, self.device)

    def encode(
        self, prompt: list[dict], text: str, finished: bool, variables: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of prompt and completion in the reward model's chat template.

        finished: append the end-of-turn token, which a truncated completion lacks.
        variables: keyword arguments for the template.
        """
        answer = encode_answer(text, self.tokenizer, end=self._end if finished else None)
        return encode_prompt(self.tokenizer, prompt, variables), answer

    @staticmethod
    def pad(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Experience:
        """Batch of token ids without log-probabilities."""
        return build_experience(prompts, completions, [[0.0] * len(c) for c in completions])
