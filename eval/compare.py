"""The comparison of an evaluate stage: means, intervals and paired differences of every metric."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.eval.metrics import Interval, bootstrap_interval, paired_bootstrap_difference


class Metric(NamedTuple):
    """One column of the table. `better` is 1 if higher is better, 0 if it depends."""

    key: str
    label: str
    better: int


METRICS = (
    Metric("scores", "Reward-model score", 1),
    Metric("f1", "Token F1", 1),
    Metric("preference", "Preference accuracy", 1),
    Metric("kl", "KL to reference (nats)", 0),
    Metric("lengths", "Completion length (tokens)", 0),
    Metric("eos", "Ended with EOS (share)", 0),
)


def compare(results: dict[str, Any], *, resamples: int, seed: int) -> dict[str, Any]:
    """Table of an evaluate stage's results.json; a metric that no model has is left out.

    Each model is compared with the baseline and with every model before it in the list, paired by prompt.
    """
    models: dict[str, dict] = results.get("models") or {}
    names = list(models)
    baseline = results.get("baseline") or (names[0] if names else None)
    notes: list[str] = []
    columns = []
    for metric in METRICS:
        values = {name: found for name in names if (found := _values(models[name], metric.key)) is not None}
        cells = {name: _cell(array, resamples, seed) for name, array in values.items()}
        for name in names:
            if metric.key == "preference" and name not in cells and (known := _accuracy_only(models[name])):
                cells[name] = known
        if not cells:
            continue
        differences = []
        for model, against in _pairs(names, baseline):
            if model not in values or against not in values:
                continue
            difference = _difference(values[model], values[against], resamples, seed)
            if difference is None:
                notes.append(f"{metric.label}: {model} and {against} share no scored prompts and are not compared.")
            else:
                differences.append({"model": model, "against": against, **difference})
        columns.append({**metric._asdict(), "models": cells, "differences": differences})
    return {
        "models": names,
        "checkpoints": {name: models[name].get("checkpoint") for name in names},
        "baseline": baseline,
        "pairs": _pairs(names, baseline),
        "metrics": columns,
        "resamples": resamples,
        "reward_model_accuracy": results.get("reward_model_accuracy"),
        "notes": notes,
    }


def _pairs(names: list[str], baseline: str | None) -> list[tuple[str, str]]:
    """(model, against): the baseline first, then the models before it in the list."""
    pairs = []
    for i, model in enumerate(names):
        if model != baseline and baseline in names:
            pairs.append((model, str(baseline)))
        pairs += [(model, earlier) for earlier in names[:i] if earlier != baseline and model != baseline]
    return pairs


def _values(model: dict[str, Any], key: str) -> NDArray[np.float64] | None:
    """One number for each prompt, NaN where a prompt was not scored; None if there are none at all."""
    raw = (model.get("preference") or {}).get("values") if key == "preference" else model.get(key)
    if not isinstance(raw, list):
        return None
    array = np.array([np.nan if value is None else float(value) for value in raw], dtype=np.float64)
    array[~np.isfinite(array)] = np.nan
    return None if np.isnan(array).all() else array


def _cell(array: NDArray[np.float64], resamples: int, seed: int) -> dict[str, Any]:
    scored = array[~np.isnan(array)]
    interval = bootstrap_interval(scored, resamples=resamples, seed=seed)
    return {**_ends(interval), "n": int(scored.size), "unscored": int(array.size - scored.size)}


def _accuracy_only(model: dict[str, Any]) -> dict[str, Any] | None:
    preference = model.get("preference") or {}
    if preference.get("accuracy") is None:
        return None
    return {
        "mean": preference["accuracy"],
        "low": None,
        "high": None,
        "n": preference.get("n"),
        "unscored": 0,
    }


def _difference(a: NDArray[np.float64], b: NDArray[np.float64], resamples: int, seed: int) -> dict[str, Any] | None:
    if a.size != b.size:
        return None
    both = ~(np.isnan(a) | np.isnan(b))
    if not both.any():
        return None
    interval = paired_bootstrap_difference(a[both], b[both], resamples=resamples, seed=seed)
    return {**_ends(interval), "n": int(both.sum())}


def _ends(interval: Interval) -> dict[str, float | None]:
    return {key: None if np.isnan(value) else value for key, value in interval._asdict().items()}
