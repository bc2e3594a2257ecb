"""Answer the requests of an evaluation with vLLM in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat import tokenizer_fingerprint
from align.models.weights import published_weights
from align.rollout.requests import Generation, Pair, Request, Scored, decode_completion
from align.rollout.vllm_engine import VllmEngine
from align.rollout.vllm_options import check_temperature
from align.run.checkpoint import read_config
from align.train.checkpoint import load_policy

TARGETS_AT_A_TIME = 128
"""Maximum number of tokens whose log-probabilities are requested in one request."""
WRITTEN = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
"""Keys of a configuration that do not change the model in the engine, which has its own dtype."""


class VllmModel:
    """A model under evaluation in a vLLM engine, which is started with `detokenizes`.

    `max_length` is the engine's less two: vLLM also reads the last token of a target, and generates one more token.
    """

    def __init__(self, engine: VllmEngine, tokenizer: PreTrainedTokenizerBase, folder: Path):
        if not engine.detokenizes:
            raise ValueError("the engine ignores stop strings; start it with detokenizes=True")
        self.engine, self.tokenizer, self._configured = engine, tokenizer, _configuration(folder)
        self._updates = 0
        self.max_length = engine.rollout.max_model_length - 2

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        from vllm import SamplingParams

        for temperature in {request.temperature for request in requests}:
            check_temperature(temperature)
        parameters = [
            SamplingParams(
                max_tokens=request.max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                stop=list(request.stop),
                stop_token_ids=list(request.stop_token_ids),
                # Only the request's own tokens end a completion, not those of the checkpoint's configuration.
                ignore_eos=True,
                detokenize=bool(request.stop),
                skip_special_tokens=True,
            )
            for request in requests
        ]
        for index, output in self.engine.stream([request.prompt_ids for request in requests], parameters):
            (sampled,) = output.outputs
            ids = tuple(sampled.token_ids)
            text = decode_completion(self.tokenizer, ids, requests[index])
            yield index, Generation(ids, text, sampled.finish_reason == "stop")

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Targets of one token after the same prefix are scored in one request, which may read the prefix cache."""
        yield from self._score_tokens([i for i, pair in enumerate(pairs) if len(pair.target_ids) == 1], pairs)
        yield from self._score_texts([i for i, pair in enumerate(pairs) if len(pair.target_ids) > 1], pairs)

    def load(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
        """See `EvalModel`. The new checkpoint needs the same configuration and tokenizer."""
        if _configuration(folder) != self._configured:
            return False
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(self.tokenizer):
            return False
        dtype = str(self.engine.dtype).removeprefix("torch.")
        self._updates += 1
        self.engine.update_weights(published_weights(load_policy(folder, dtype, frozen=True)), self._updates)
        self.tokenizer = tokenizer
        return True

    def close(self) -> None:
        self.engine.close()

    def _score_tokens(self, places: list[int], pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        from vllm import SamplingParams

        groups: dict[tuple[int, ...], list[int]] = {}
        for place in places:
            groups.setdefault(pairs[place].prefix_ids, []).append(place)
        requests: list[tuple[tuple[int, ...], list[int]]] = []
        for prefix, group in groups.items():
            for start in range(0, len(group), TARGETS_AT_A_TIME):
                requests.append((prefix, group[start : start + TARGETS_AT_A_TIME]))
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0,
                logprob_token_ids=list(dict.fromkeys(pairs[place].target_ids[0] for place in group)),
                ignore_eos=True,
                detokenize=False,
            )
            for _, group in requests
        ]
        for index, output in self.engine.stream([prefix for prefix, _ in requests], parameters):
            (sampled,) = output.outputs
            (likeliest,), (logprobs,) = sampled.token_ids, sampled.logprobs
            for place in requests[index][1]:
                token = pairs[place].target_ids[0]
                value = float(logprobs[token].logprob)
                yield place, Scored(value, (value,), token == likeliest)

    def _score_texts(self, places: list[int], pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        from vllm import SamplingParams

        settings = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True, detokenize=False, seed=0
        )
        prompts = [pairs[place].prefix_ids + pairs[place].target_ids for place in places]
        for index, output in self.engine.stream(prompts, [settings] * len(prompts)):
            pair = pairs[places[index]]
            found: list[Any] = [
                output.prompt_logprobs[position][token]
                for position, token in enumerate(pair.target_ids, start=len(pair.prefix_ids))
            ]
            logprobs = tuple(float(entry.logprob) for entry in found)
            yield places[index], Scored(sum(logprobs), logprobs, all(entry.rank == 1 for entry in found))


def _configuration(folder: Path) -> dict[str, Any]:
    """The configuration without the keys in `WRITTEN`."""
    return {name: value for name, value in read_config(folder).items() if name not in WRITTEN}
