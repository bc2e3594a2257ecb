"""Answer the requests of an evaluation with the transformers model: for machines without vLLM, and as a reference.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.models.forward import unwrap
from align.models.lora.adapters import AnyModel
from align.parallel.group import any_rank, exchange
from align.parallel.sharding import world
from align.rollout.requests import Generation, Pair, Request, Scored, decode_completion

MARGIN = 16
"""Number of last tokens decoded to find a stop string, in addition to one per character of the longest stop string."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class HuggingFaceModel:
    """A model under evaluation in transformers, on its own device.

    Under several ranks all of them make the same calls with the same requests. Each rank computes some of the batches,
    and every rank gets all results.

    max_length: see `EvalModel`.
    batch_size: sequences per forward pass; affects results by floating-point rounding only.
    run: returns function(model, ...), a forward pass; needed for a model that DeepSpeed shards.
    """

    def __init__(
        self,
        model: AnyModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int,
        run: Callable[..., Any] | None = None,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self._run = run or (lambda function, *arguments: function(self.model, *arguments))

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        # Requests of similar length share a batch, which keeps padding small.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), -requests[i].max_new_tokens))

        def answer(batch: Sequence[int]) -> list[tuple[int, Generation]]:
            decoded = zip(batch, self._decode([requests[i] for i in batch]), strict=True)
            return [(place, self._generation(ids, finished, requests[place])) for place, (ids, finished) in decoded]

        return self._spread(order, answer)

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Score the pairs. Pairs with equal inputs, such as targets of one token after one prefix, share a row."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for place, pair in enumerate(pairs):
            rows.setdefault((pair.prefix_ids + pair.target_ids)[:-1], []).append(place)
        inputs = sorted(rows, key=len, reverse=True)

        def answer(batch: Sequence[tuple[int, ...]]) -> list[tuple[int, Scored]]:
            longest = max(len(pairs[place].target_ids) for ids in batch for place in rows[ids])
            logprobs_BTV = self._logprobs(batch, longest)
            found = []
            for row, ids in enumerate(batch):
                for place in rows[ids]:
                    target = torch.tensor(pairs[place].target_ids, device=logprobs_BTV.device)
                    scores_TV = logprobs_BTV[row, -len(target) :]
                    values = scores_TV.gather(1, target[:, None])[:, 0]
                    greedy = bool((scores_TV.argmax(-1) == target).all())
                    logprobs = tuple(values.tolist())
                    found.append((place, Scored(sum(logprobs), logprobs, greedy)))
            return found

        return self._spread(inputs, answer)

    def _spread(
        self, items: Sequence[Item], answer: Callable[[Sequence[Item]], list[tuple[int, Result]]]
    ) -> Iterator[tuple[int, Result]]:
        """Answer the items in batches, one batch per rank at a time, and yield the results of all ranks."""
        rank, ranks = world()
        batches = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        for start in range(0, len(batches), ranks):
            here = batches[start : start + ranks]
            # A rank without a batch repeats the first, because each forward pass needs all ranks.
            found = answer(here[rank] if rank < len(here) else here[0])
            for results in [found] if ranks == 1 else exchange(found)[: len(here)]:
                yield from results

    def load(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return False: loading the weights into this model would not be faster than building a new one."""
        return False

    def close(self) -> None:
        del self.model, self._run

    @torch.no_grad()
    def _logprobs(self, inputs: Sequence[tuple[int, ...]], last: int) -> Tensor:
        """Log-probabilities [B, T, V] after the last `last` tokens of each input."""
        ids_BT, mask_BT = self._padded(inputs)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
        options = {"attention_mask": mask_BT, "position_ids": positions_BT, "logits_to_keep": last}
        logits_BTV = self._run(_forward, ids_BT, options | {"use_cache": False}).logits
        logprobs_BTV: Tensor = logits_BTV.float().log_softmax(-1)
        return logprobs_BTV

    @torch.no_grad()
    def _decode(self, requests: Sequence[Request]) -> list[tuple[list[int], bool]]:
        """(token ids, True if finished) of each completion of one batch."""
        generators = [torch.Generator(self.model.device).manual_seed(request.seed) for request in requests]
        ids_BT, mask_BT = self._padded([request.prompt_ids for request in requests])
        tokens: list[list[int]] = [[] for _ in requests]
        finished = [False] * len(requests)
        running = list(range(len(requests)))
        cache = None
        while any_rank(bool(running)):
            if not running:  # other ranks are decoding, and their forward passes need this one
                self._run(_forward, ids_BT[:, -1:], {"use_cache": False, "logits_to_keep": 1})
                continue
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
            options = {"attention_mask": mask_BT, "position_ids": positions_BT, "logits_to_keep": 1}
            output = self._run(_forward, ids_BT, options | {"past_key_values": cache, "use_cache": True})
            cache = output.past_key_values
            logits_BV = output.logits[:, -1].float()
            next_B = logits_BV.argmax(-1)
            for row in running:
                if requests[row].temperature:
                    next_B[row] = sample(logits_BV[row], requests[row], generators[row])
            for row, token in enumerate(next_B.tolist()):
                if row in running:
                    tokens[row].append(token)
                    finished[row] = self._stops(tokens[row], requests[row])
            running = [r for r in running if not finished[r] and len(tokens[r]) < requests[r].max_new_tokens]
            ids_BT = next_B[:, None]
            mask_BT = torch.cat((mask_BT, mask_BT.new_ones(len(requests), 1)), dim=1)
        return list(zip(tokens, finished, strict=True))

    def _generation(self, ids: list[int], finished: bool, request: Request) -> Generation:
        return Generation(tuple(ids), decode_completion(self.tokenizer, ids, request), finished)

    def _stops(self, tokens: list[int], request: Request) -> bool:
        """True if the last token ends the completion."""
        if tokens[-1] in request.stop_token_ids:
            return True
        if not request.stop:
            return False
        recent = tokens[-(MARGIN + max(map(len, request.stop))) :]
        text = str(self.tokenizer.decode(recent, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return any(stop in text for stop in request.stop)

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T], padded on the left, so that the last column holds every row's last token."""
        longest, device = max(map(len, rows)), self.model.device
        ids_BT = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in rows], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        return ids_BT, mask_BT


def _forward(model: AnyModel, ids_BT: Tensor, options: dict[str, Any]) -> Any:
    """Forward pass of the model without its wrapper. A trainer under DeepSpeed has replaced its own `forward`."""
    inside = unwrap(model)
    return type(inside).forward(inside, input_ids=ids_BT, **options)


def sample(logits_V: Tensor, request: Request, generator: torch.Generator) -> Tensor:
    """A token from softmax(logits / temperature), restricted to the likeliest tokens that together have `top_p`."""
    logprobs_V = (logits_V / request.temperature).log_softmax(-1)
    if request.top_p < 1:
        ordered, order = logprobs_V.sort(descending=True)
        probabilities = ordered.exp()
        beyond = probabilities.cumsum(-1) - probabilities >= request.top_p
        logprobs_V = logprobs_V.masked_fill(beyond[order.argsort()], -torch.inf)
    # The argmax of log p - log(exponential variable) is a sample from p (the Gumbel-max trick).
    noise_V = torch.empty_like(logprobs_V).exponential_(generator=generator)
    return (logprobs_V - noise_V.log()).argmax()
