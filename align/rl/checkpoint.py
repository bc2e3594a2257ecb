"""Checkpoints of a PPO run, from which a killed run resumes as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import UserError
from align.parallel.group import from_rank_0
from align.reward.mixture import Scorer
from align.rl.models import Models
from align.rl.sample import Rollouts, RolloutSampler
from align.rollout.store import completion_tensors, stored_completions
from align.run.folder import remove_folder, replace_file
from align.train.finite import require_finite
from align.train.state import load_state, save_state

SAMPLES = "drawn.safetensors"


@dataclass
class Progress:
    """Progress of a run.

    step: number of completed iterations.
    kl_coef: KL coefficient of the next iteration.
    """

    step: int
    kl_coef: float


class Checkpoint:
    """The checkpoint of a run, in `folder`: everything that determines the rest of the run.

    It has the trained weights, optimizer states, EMA weights, torch's random state, the sampler's position, the KL
    coefficient, the running moments of the rewards, and completions that are sampled but not yet trained on. All ranks
    must make the same calls.
    """

    def __init__(self, folder: Path, models: Models, sampler: RolloutSampler, scorer: Scorer):
        self.folder, self.models, self.sampler, self.scorer = folder, models, sampler, scorer

    @property
    def last(self) -> Path:
        """Folder of the last checkpoint."""
        return self.folder / "last"

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run of the stage."""
        from_rank_0("removing old checkpoints", lambda: remove_folder(self.folder))

    def save(self, progress: Progress) -> None:
        """Replace the last checkpoint, or leave it untouched if anything fails."""
        learners = self.folder / "next"
        for learner in self.models.learners.values():
            require_finite(learner.model, self.folder.parent)
        from_rank_0("preparing a checkpoint", lambda: remove_folder(learners))
        try:
            for name, learner in self.models.learners.items():
                learner.save(learners / name)
            from_rank_0("writing a checkpoint", lambda: self._write(progress, learners))
        except UserError:
            remove_folder(learners)
            raise

    def _write(self, progress: Progress, learners: Path) -> None:
        """Write a checkpoint; `learners` is the folder in which the learners have saved their state."""
        pending = self.sampler.wait_for_pending()
        tensors = {} if pending is None else completion_tensors(pending.position, pending.completions)
        counters = {
            "step": progress.step,
            "kl_coef": progress.kl_coef,
            "position": self.sampler.position,
            "scorer": self.scorer.state_dict(),
        }
        save_state(self.last, counters, tensors, learners)
        remove_folder(learners)

    def save_samples(self, samples: Rollouts) -> None:
        """Save samples before their update, so that a run interrupted during the update need not sample them again."""

        def write() -> None:
            tensors = completion_tensors(samples.position, samples.completions)
            replace_file(self.folder / SAMPLES, lambda file: save_file(tensors, file))

        from_rank_0("keeping the samples", write)

    def load(self) -> Progress | None:
        """Restore the last checkpoint and the samples not yet trained on; return None if there is no checkpoint.

        Without a checkpoint, samples of the first iteration are still restored.
        """
        counters = from_rank_0("reading the checkpoint", self._read)
        if counters is None:
            return None
        for name, learner in self.models.learners.items():
            learner.load(self.last / name)
        self.scorer.load_state_dict(counters["scorer"])
        self.sampler.position = counters["position"]
        return Progress(counters["step"], counters["kl_coef"])

    def _read(self) -> dict[str, Any] | None:
        """On rank 0: restore the random state and the sampler's samples; return the checkpoint's counters."""
        counters: dict[str, Any] | None = None
        tensors: dict[str, Tensor] = {}
        if self.last.is_dir():
            counters, tensors = load_state(self.last)
        samples = stored_completions(tensors)
        if samples is None and (self.folder / SAMPLES).is_file():
            samples = stored_completions(load_file(self.folder / SAMPLES))
        self.sampler.resume(counters["position"] if counters is not None else 0, samples)
        return counters
