"""Checkpoints of a PPO run, from which a killed run resumes as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import UserError
from align.reward.mixture import Scorer
from align.rl.follow import load_learners, save_learners, tell
from align.rl.models import Models
from align.rl.sample import Draw, Sampler
from align.rollout.store import completion_tensors, stored_completions
from align.run.folder import remove_folder, replace_file
from align.train.state import load_state, save_state

DRAWN = "drawn.safetensors"


@dataclass
class Progress:
    """Completed iterations, and the KL coefficient of the next one."""

    step: int
    kl_coef: float


class Checkpoint:
    """The checkpoints of a run, in `folder`: everything that determines what follows.

    Trained weights and both optimizers, EMA weights, random states, the sampler's position, the KL coefficient, running
    moments of the rewards, and a rollout batch that is sampled but not yet learned from.
    """

    def __init__(self, folder: Path, models: Models, sampler: Sampler, scorer: Scorer):
        self.folder, self.models, self.sampler, self.scorer = folder, models, sampler, scorer

    @property
    def exists(self) -> bool:
        return (self.folder / "last").is_dir()

    def save(self, progress: Progress) -> None:
        """Replace the last checkpoint, or leave it untouched if anything fails."""
        ahead = self.sampler.wait()
        tensors = {} if ahead is None else completion_tensors(ahead.position, ahead.completions)
        learners = self.folder / "next"
        remove_folder(learners)
        try:
            tell("save", learners)
            save_learners(self.models, learners)
            counters = {
                "step": progress.step,
                "kl_coef": progress.kl_coef,
                "position": self.sampler.position,
                "scorer": self.scorer.state_dict(),
            }
            save_state(self.folder / "last", counters, tensors, learners)
        except UserError:
            remove_folder(learners)
            raise
        remove_folder(learners)

    def save_drawn(self, drawn: Draw) -> None:
        """Keep a rollout batch between its sampling and its update."""
        tensors = completion_tensors(drawn.position, drawn.completions)
        replace_file(self.folder / DRAWN, lambda file: save_file(tensors, file))

    def load(self) -> Progress:
        """Restore the last checkpoint."""
        last = self.folder / "last"
        tell("load", last)
        load_learners(self.models, last)
        counters, tensors = load_state(last)
        self.scorer.load_state_dict(counters["scorer"])
        self.resume_sampler(counters["position"], tensors)
        return Progress(counters["step"], counters["kl_coef"])

    def resume_sampler(self, position: int, tensors: dict[str, Tensor] | None = None) -> None:
        """Continue sampling at `position`, with the rollout batch that was sampled but not learned from, if any."""
        drawn = stored_completions(tensors or {})
        if drawn is None and (self.folder / DRAWN).is_file():
            drawn = stored_completions(load_file(self.folder / DRAWN))
        self.sampler.resume(position, drawn)
