"""KTO on labelled completions: the loss of a pass, and the estimate of the KL that all passes of a step share.

The KL between policy and reference is estimated on the completions of other prompts: a step's completions are rotated
over its rows. The estimate depends on the rows of the step and their order, not on passes or ranks.

Shapes: R rows of a data set, B rows of a step or pass, M mismatched completions, S sequences, N tokens with a loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.config.stages import KtoStage
from align.data.prepare import Prepared
from align.data.store.stream import StreamedRows
from align.data.store.tokenised import Rows, list_hashes
from align.losses.preference import kto_kl, kto_loss
from align.models.forward import unwrap
from align.models.lora.adapters import AnyModel
from align.run.context import StageContext
from align.train.objectives import IGNORED, Measured, Objective
from align.train.passes import Example, PackedPass, Totals
from align.train.references import Reference, sequence_logprobs
from align.train.steps import Examples, steps_of_run
from align.train.trainer import WINDOW, PackedTrainer


@dataclass(frozen=True)
class Completion(Example):
    """A prompt and its completion.

    values: log-probability of the completion under the reference, and the label, 1 if desirable and otherwise 0.
    number: index of the row in its data set.
    prompt: number of tokens of the prompt.
    """

    number: int = 0
    prompt: int = 0


@dataclass(frozen=True)
class Mismatched:
    """Prompts with the completions of other rows, and their log-probabilities under the reference.

    prompts_R: hash of each row's prompt.
    pairs_M: index of the prompt's row times R, plus index of the completion's row; ascending.
    logprobs_M: log-probability of the completion.
    """

    prompts_R: np.ndarray
    pairs_M: np.ndarray
    logprobs_M: np.ndarray

    def logprob(self, prompt: int, completion: int) -> float:
        """Log-probability of the completion of row `completion` after the prompt of row `prompt`."""
        pair = prompt * len(self.prompts_R) + completion
        place = np.searchsorted(self.pairs_M, pair)
        assert self.pairs_M[place] == pair
        return float(self.logprobs_M[place])


@dataclass
class Kto:
    """The stage's loss on labelled completions, from `align.losses.preference`.

    references: log-probabilities of the completions under the reference [R, 1].
    mismatched: mismatched completions for the estimate of the KL; None if the loss needs none.
    """

    stage: KtoStage
    references: np.ndarray | None = None
    mismatched: Mismatched | None = None
    columns: tuple[str, ...] = ("prompt_ids", "completion_ids", "completion_labels", "label")
    uses_dropout: bool = False

    def example(self, row: dict[str, Any], number: int) -> Completion:
        prompt = row["prompt_ids"]
        ids = torch.tensor(prompt + row["completion_ids"])
        mask = torch.tensor([IGNORED] * len(prompt) + row["completion_labels"]) != IGNORED
        reference = 0.0 if self.references is None else float(self.references[number, 0])
        return Completion((ids,), (mask,), values=(reference, row["label"][0]), number=number, prompt=len(prompt))

    def mismatched_examples(self, examples: Sequence[Completion]) -> list[Example]:
        """Each prompt of a step with the completion of another; values: the reference's log-probability.

        Prompts without a completion of another prompt are omitted.
        """
        if self.mismatched is None:
            return []
        found = donors([self.mismatched.prompts_R[example.number] for example in examples])
        pairs = zip(examples, found.tolist(), strict=True)
        return [self._mismatched(example, examples[donor]) for example, donor in pairs if donor >= 0]

    def _mismatched(self, example: Completion, donor: Completion) -> Example:
        assert self.mismatched is not None
        found = mismatch(example, donor, self.stage.data.max_length)
        return replace(found, values=(self.mismatched.logprob(example.number, donor.number),))

    def measure(self, model: AnyModel, packed: PackedPass, totals: Totals) -> Measured:
        stage, policy = self.stage, unwrap(model)
        output = packed.forward(policy.model, output_router_logits=torch.is_grad_enabled())
        hidden = packed.predicting(output.last_hidden_state)
        scores = policy.lm_head(hidden, packed.predicted_N, mean_logits=True)
        logprobs = packed.by_sequence(scores.logprobs_N)
        references, desirable = packed.values.unbind(1)
        loss, _ = kto_loss(
            logprobs,
            references.float(),
            desirable.bool(),
            logprobs.new_tensor(totals.kl),
            beta=stage.beta,
            desirable_weight=stage.desirable_weight,
            undesirable_weight=stage.undesirable_weight,
            count=totals.rows,
        )
        rows = len(packed.host_values)
        means: dict[str, tuple[Tensor, float]] = {"entropy": (scores.entropy_N.sum(), len(scores.entropy_N))}
        if stage.needs_kl:
            means["kto_kl"] = (logprobs.new_tensor(totals.kl * rows), rows)
        rewards = stage.beta * (logprobs.detach() - references)
        margin, undesirable = rewards.new_zeros(()), totals.rows - totals.desirable
        logits, top1 = packed.by_sequence(scores.mean_logits_N), packed.by_sequence(scores.top1_N.float())
        for side, label, in_step in (("chosen", 1, totals.desirable), ("rejected", 0, undesirable)):
            if not in_step:
                continue
            own, here = desirable == label, packed.host_values[:, 1] == label
            tokens = int(packed.loss_tokens_S[here].sum())
            means[f"rewards/{side}"] = ((rewards * own).sum(), int(here.sum()))
            means[f"logps/{side}"] = ((logprobs.detach() * own).sum(), int(here.sum()))
            means[f"logits/{side}"] = ((logits * own).sum(), tokens)
            margin += (1 if label else -1) * (rewards * own).sum() / in_step
            if label:
                means["mean_token_accuracy"] = ((top1 * own).sum(), tokens)
        if totals.desirable and undesirable:
            means["rewards/margins"] = (margin, rows / totals.rows)
        return Measured(loss, output.router, means)


def mismatch(example: Completion, donor: Completion, max_length: int) -> Example:
    """The prompt of `example` with the completion of `donor`, truncated to `max_length` tokens."""
    parts = [
        torch.cat([own[: example.prompt], other[donor.prompt :]])[:max_length]
        for own, other in ((example.ids[0], donor.ids[0]), (example.masks[0], donor.masks[0]))
    ]
    return Example((parts[0],), (parts[1],))


def donors(prompts_B: Sequence[int] | np.ndarray) -> np.ndarray:
    """Row of the step whose completion each row's prompt gets [B]; -1 if there is none.

    Rows with equal prompts are put together, and completions are rotated over the rows by the size of the largest such
    group: by one if all prompts differ, as in TRL. So a prompt gets a completion of its own only if more than half of
    the rows have this prompt; -1 replaces it.
    """
    prompts = np.asarray(prompts_B)
    if not len(prompts):
        return np.zeros(0, np.int64)
    _, first, group = np.unique(prompts, return_index=True, return_inverse=True)
    order = np.argsort(first[group], kind="stable")
    found = np.empty_like(order)
    found[order] = np.roll(order, np.bincount(group).max())
    found[prompts == prompts[found]] = -1
    return found


class _MismatchedRows:
    """Mismatched completions as examples."""

    def __init__(self, examples: Examples, pairs_M: np.ndarray, max_length: int):
        self.examples, self.pairs_M, self.max_length = examples, pairs_M, max_length

    def __len__(self) -> int:
        return len(self.pairs_M)

    def __getitem__(self, number: int) -> Example:
        prompt, completion = (self.examples[int(row)] for row in divmod(self.pairs_M[number], len(self.examples)))
        assert isinstance(prompt, Completion)
        assert isinstance(completion, Completion)
        return mismatch(prompt, completion, self.max_length)


def kto_objectives(parent: Path, stage: KtoStage, context: StageContext, data: Prepared) -> tuple[Kto, Kto | None]:
    """(objective of the training rows, objective of the held-out rows if any); collective.

    The objectives have the log-probabilities under the reference `parent`.
    """
    reference, objective = Reference(parent, stage, context, data), Kto(stage)
    known = reference.of_data(objective)
    assert not isinstance(data.train, StreamedRows), "a stage with a reference does not stream"
    train = replace(objective, references=known.train)
    held_out = None if data.held_out is None else replace(objective, references=known.held_out)
    if stage.needs_kl:
        steps = steps_of_run(stage, data.train, context.seed)
        train.mismatched = _mismatched("mismatched", data.train, steps, reference, objective)
        if held_out is not None and data.held_out is not None:
            together = [range(len(data.held_out))]
            held_out.mismatched = _mismatched("mismatched_held_out", data.held_out, together, reference, objective)
    return train, held_out


def _mismatched(
    name: str, rows: Rows, steps: Iterable[Sequence[int]], reference: Reference, objective: Kto
) -> Mismatched:
    """The mismatched completions of all steps, under the reference."""
    prompts, found = list_hashes(rows, "prompt_ids"), [np.zeros(0, np.int64)]
    for step in map(np.array, steps):
        chosen = donors(prompts[step])
        found.append((step * len(rows) + step[chosen])[chosen >= 0])
    pairs = np.unique(np.concatenate(found))
    length = objective.stage.data.max_length
    examples = _MismatchedRows(Examples(rows, objective), pairs, length)
    key = hashlib.sha256(pairs.tobytes() + f" {length}".encode()).hexdigest()
    return Mismatched(prompts, pairs, reference.of(name, examples, range(len(pairs)), pairs=key)[:, 0])


class KtoTrainer(PackedTrainer):
    """`PackedTrainer` that estimates the KL before the passes of a step. All held-out rows count as one step."""

    def _totals(self, model: Any, examples: Sequence[Example], objective: Objective) -> Totals:
        assert isinstance(objective, Kto)
        completions = [example for example in examples if isinstance(example, Completion)]
        totals = super()._totals(model, examples, objective)
        return totals._replace(
            desirable=sum(int(example.values[1]) for example in completions),
            kl=self._kl(model, objective.mismatched_examples(completions)),
        )

    @torch.no_grad()
    def _kl(self, model: Any, mismatched: Sequence[Example]) -> float:
        """Estimate of the KL from the mismatched completions, the same on all ranks; 0 if there are none."""
        if not mismatched:
            return 0.0
        logprobs_M = torch.zeros(len(mismatched), dtype=torch.float64, device=self.args.device)
        for start in range(0, len(mismatched), WINDOW):
            window = mismatched[start : start + WINDOW]
            for part in self._parts(window):
                packed = PackedPass([window[item] for item in part.items], self.args.device)
                found = self._forward(model, sequence_logprobs, packed)
                if part.counts:
                    logprobs_M[[start + item for item in part.items]] = found.double()
        if self.args.world_size > 1:
            logprobs_M = self.accelerator.reduce(logprobs_M, "sum")
        references_M = torch.tensor([example.values[0] for example in mismatched]).to(logprobs_M)
        return kto_kl(logprobs_M, references_M).item()
