"""What a killed run needs to go on as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from align.rl.draw import Draw, Sampler
from align.rl.team import Team
from align.rollout.scoring import Scorer
from align.rollout.store import completion_tensors, stored_completions
from align.train.ema import Ema
from align.train.run_folder import replace_file
from align.train.state import load_state, save_state

DRAWN = "drawn.safetensors"


@dataclass
class Progress:
    """What changes from round to round beside weights: step, rounds that are done; kl_coef, the next round's."""

    step: int
    kl_coef: float


class Checkpoint:
    """The checkpoints of a run, in `folder`: everything that determines what follows.

    Trained weights and both optimizers, the average of the weights, random states, the sampler's position, the KL
    coefficient, running means of the rewards, and a round that is sampled but not yet learned from.
    """

    def __init__(self, folder: Path, team: Team, sampler: Sampler, scorer: Scorer, ema: Ema | None):
        self.folder, self.team, self.sampler, self.scorer, self.ema = folder, team, sampler, scorer, ema

    @property
    def exists(self) -> bool:
        return (self.folder / "last").is_dir()

    def save(self, progress: Progress) -> None:
        """Write all of it, or leave what was there."""
        ahead = self.sampler.wait()
        tensors = {f"ema.{name}": tensor for name, tensor in (self.ema.average if self.ema else {}).items()}
        if ahead is not None:
            tensors |= completion_tensors(ahead.position, ahead.completions)
        learners = self.team.learners
        save_state(
            self.folder / "last",
            {name: learner.model for name, learner in learners.items()},
            {name: learner.optimizer for name, learner in learners.items()},
            {
                "step": progress.step,
                "kl_coef": progress.kl_coef,
                "position": self.sampler.position,
                "scorer": self.scorer.state_dict(),
            },
            tensors,
        )

    def save_drawn(self, drawn: Draw) -> None:
        """Keep a round between its sampling and its update."""
        tensors = completion_tensors(drawn.position, drawn.completions)
        replace_file(self.folder / DRAWN, lambda file: save_file(tensors, file))

    def load(self) -> Progress:
        """Put everything back."""
        learners = self.team.learners
        counters, tensors = load_state(
            self.folder / "last",
            {name: learner.model for name, learner in learners.items()},
            {name: learner.optimizer for name, learner in learners.items()},
        )
        if self.ema is not None:
            for name, average in self.ema.average.items():
                average.copy_(tensors[f"ema.{name}"])
        self.scorer.load_state_dict(counters["scorer"])
        self.resume_sampler(counters["position"], tensors)
        return Progress(counters["step"], counters["kl_coef"])

    def resume_sampler(self, position: int, tensors: dict | None = None) -> None:
        drawn = stored_completions(tensors or {})
        if drawn is None and (self.folder / DRAWN).is_file():
            drawn = stored_completions(load_file(self.folder / DRAWN))
        self.sampler.resume(position, drawn)
