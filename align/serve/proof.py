"""The proof at the start: the server's log-probabilities of a probe prompt equal those of transformers and PEFT.

The reference is computed in a process of its own, which has ended when the engine starts.

Shapes: T tokens of the probe prompt, C tokens of its completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from align.errors import UserError
from align.rollout.self_check import LIMITS

PROMPT, COMPLETION = 24, 8
"""Tokens of the probe."""
BASE = ""
"""Name of the base model among the probed models."""
SEEN = 1e-5
"""Difference of log-probabilities from which an adapter counts as changing them."""


@dataclass(frozen=True)
class Probed:
    """Log-probabilities of one model.

    prompt: Of each token of the prompt after the first [T - 1].
    tokens, completion: Greedy completion [C] and its log-probabilities [C].
    """

    prompt: list[float]
    tokens: list[int]
    completion: list[float]

    @property
    def all(self) -> list[float]:
        return [*self.prompt, *self.completion]

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.all))


def probe_prompt(vocabulary: int) -> list[int]:
    """Token ids [T], spread over the vocabulary."""
    return [(7919 * number + 13) % vocabulary for number in range(PROMPT)]


def references(checkpoint: Path, dtype: str, adapters: Mapping[str, Path], prompt: list[int]) -> dict[str, Probed]:
    """Log-probabilities by transformers and PEFT of the base model (`BASE`) and of it with each adapter."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_references, checkpoint, dtype, dict(adapters), prompt).result()


def _references(checkpoint: Path, dtype: str, adapters: dict[str, Path], prompt: list[int]) -> dict[str, Probed]:
    from align.models.lora.stock import with_adapter
    from align.train.checkpoint import load_policy
    from align.train.quiet import quieten

    quieten()
    model = load_policy(checkpoint, dtype).eval()
    found = {BASE: _probed(model, prompt)}
    for name, folder in adapters.items():
        try:
            with with_adapter(model, folder) as adapted:
                found[name] = _probed(adapted, prompt)
        except Exception as error:  # PEFT raises many types for adapters it cannot load
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{folder}: PEFT cannot load it ({reason}); save it with PEFT's save_pretrained.") from None
    return found


def _probed(model: object, prompt: list[int]) -> Probed:
    import torch

    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(COMPLETION):
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0]  # type: ignore[operator]
            ids.append(int(logits_TV[-1].argmax()))
        logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)  # type: ignore[operator]
    values = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return Probed(values[: PROMPT - 1], ids[PROMPT:], values[PROMPT - 1 :])


def difference(one: Probed, other: Probed) -> tuple[float, float]:
    """(largest, mean) difference of two models' log-probabilities, up to the first token that differs.

    There, each model's own choice is compared: two tokens with equal probability are no difference.
    """
    same = next(
        (i for i, pair in enumerate(zip(one.tokens, other.tokens, strict=True)) if pair[0] != pair[1]), COMPLETION
    )
    pairs = [*zip(one.prompt, other.prompt, strict=True), *list(zip(one.completion, other.completion))[: same + 1]]
    differences = [abs(a - b) for a, b in pairs]
    return max(differences), sum(differences) / len(differences)


def proof_problem(name: str, served: Probed, expected: Mapping[str, Probed], dtype: str) -> str | None:
    """Reason why the server does not compute the model `name`, if any."""
    label = f"adapter '{name}'" if name else "the base model"
    reference = "transformers and PEFT" if name else "transformers"
    if not served.is_finite:
        return f"{label}: its log-probabilities are not finite"
    largest, mean = difference(served, expected[name])
    limit, mean_limit = LIMITS[dtype]
    if largest > limit and mean > mean_limit:
        return (
            f"{label}: its log-probabilities differ from those of {reference} by up to {largest:.2g} (limit {limit:g})"
        )
    effect = difference(expected[BASE], expected[name])[1]
    if name and effect > SEEN and mean > effect / 2:
        return f"{label}: the server does not apply it: its log-probabilities are nearer to the base model's"
    return None


def first_problem(served: Mapping[str, Probed], expected: Mapping[str, Probed], dtype: str) -> str | None:
    """The first problem among the models, if any."""
    problems = (proof_problem(name, served[name], expected, dtype) for name in expected)
    return next((problem for problem in problems if problem), None)


def widest(served: Mapping[str, Probed], expected: Mapping[str, Probed]) -> float:
    """Largest difference of a log-probability among the models."""
    return max(difference(served[name], expected[name])[0] for name in expected)
