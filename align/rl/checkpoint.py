"""What a killed run needs to go on as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import UserError
from align.reward.mixture import Scorer
from align.rl.follow import load_learners, save_learners, spread_learners, tell
from align.rl.models import Team
from align.rl.sample import Draw, Sampler
from align.rollout.store import completion_tensors, stored_completions
from align.run.folder import remove_folder, replace_file
from align.train.learner import Learner
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

    def __init__(self, folder: Path, team: Team, sampler: Sampler, scorer: Scorer):
        self.folder, self.team, self.sampler, self.scorer = folder, team, sampler, scorer

    @property
    def exists(self) -> bool:
        return (self.folder / "last").is_dir()

    def save(self, progress: Progress) -> None:
        """Write all of it, or leave what was there."""
        ahead = self.sampler.wait()
        tensors = {f"ema.{name}": tensor for name, tensor in self._own_average().items()}
        if ahead is not None:
            tensors |= completion_tensors(ahead.position, ahead.completions)
        learners, parts = self._own_learners(), None
        if spread_learners(self.team):
            parts = self.folder / "next"
            remove_folder(parts)
            tell("save", parts)
            save_learners(self.team, parts)
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
            parts,
        )

    def _own_learners(self) -> dict[str, Learner]:
        """Those that this process holds whole."""
        spread = spread_learners(self.team)
        return {name: learner for name, learner in self.team.learners.items() if name not in spread}

    def _own_average(self) -> dict[str, Tensor]:
        """The policy's average, if this process holds it whole."""
        average = self.team.average
        return average.average if average is not None and "policy" in self._own_learners() else {}

    def save_drawn(self, drawn: Draw) -> None:
        """Keep a round between its sampling and its update."""
        tensors = completion_tensors(drawn.position, drawn.completions)
        replace_file(self.folder / DRAWN, lambda file: save_file(tensors, file))

    def load(self) -> Progress:
        """Put everything back."""
        learners, last = self._own_learners(), self.folder / "last"
        if (last / "policy").is_dir() != bool(spread_learners(self.team)):
            raise UserError(
                f"{last}: of the interrupted run and this one, one has a `parallel` section and one has none; give "
                "both or neither (parallel.processes may differ), or start the stage again without --resume."
            )
        if spread_learners(self.team):
            tell("load", last)
            load_learners(self.team, last)
        counters, tensors = load_state(
            last,
            {name: learner.model for name, learner in learners.items()},
            {name: learner.optimizer for name, learner in learners.items()},
        )
        for name, average in self._own_average().items():
            average.copy_(tensors[f"ema.{name}"])
        self.scorer.load_state_dict(counters["scorer"])
        self.resume_sampler(counters["position"], tensors)
        return Progress(counters["step"], counters["kl_coef"])

    def resume_sampler(self, position: int, tensors: dict | None = None) -> None:
        drawn = stored_completions(tensors or {})
        if drawn is None and (self.folder / DRAWN).is_file():
            drawn = stored_completions(load_file(self.folder / DRAWN))
        self.sampler.resume(position, drawn)
