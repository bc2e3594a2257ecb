"""Searches that propose the points of a sweep, by optuna."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from align.errors import missing_dependency
from align.sweep.axes import Axis, Range

SEARCHES = ("tpe", "random")


class OptunaSearch:
    """Points proposed by optuna's sampler `kind`.

    better: 1 to maximise, -1 to minimise.
    The study is in memory only; a resumed sweep adds the earlier values with `tell`.
    """

    def __init__(self, kind: str, axes: Sequence[Axis | Range], better: int, seed: int):
        try:
            import optuna
        except ImportError as error:
            raise missing_dependency("optuna", f"--search {kind}", "pip install 'align-moe[search]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self.kind, self.seed, self.told = optuna, kind, seed, 0
        self.distributions = {axis.key: _distribution(optuna, axis) for axis in axes}
        self.study = optuna.create_study(direction="maximize" if better > 0 else "minimize")

    def ask(self) -> dict[str, str]:
        """Settings of the next point, as YAML texts. They depend only on the seed and the earlier values."""
        samplers = self._optuna.samplers
        sampler = samplers.TPESampler if self.kind == "tpe" else samplers.RandomSampler
        self.study.sampler = sampler(seed=self.seed + self.told)
        trial = self.study.ask(self.distributions)
        found = dict(trial.params)
        self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # `tell` adds it with its value
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}

    def tell(self, settings: dict[str, str], value: float | None) -> None:
        """Add a point with its value, or None if it failed."""
        self.told += 1
        state = self._optuna.trial.TrialState
        self.study.add_trial(
            self._optuna.trial.create_trial(
                params={key: _parameter(self.distributions[key], text) for key, text in settings.items()},
                distributions=self.distributions,
                value=value,
                state=state.COMPLETE if value is not None else state.FAIL,
            )
        )


def _distribution(optuna: Any, axis: Axis | Range) -> Any:
    if isinstance(axis, Axis):
        return optuna.distributions.CategoricalDistribution(axis.values)
    if axis.whole:
        return optuna.distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _parameter(distribution: Any, text: str) -> Any:
    return text if hasattr(distribution, "choices") else json.loads(text)
