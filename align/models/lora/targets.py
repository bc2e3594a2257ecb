"""The settings that make stock PEFT put an adapter's factors where they belong."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.models.lora.folder import Skeleton


def moved_by_peft(model_type: str) -> tuple[str, ...]:
    """Names of linear layers that PEFT takes for those of routed experts, in families that once had a module per
    expert. It moves targets with such names to the experts' stacks."""
    from peft.utils import transformers_weight_conversion as conversion

    known = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return tuple(conversion._MOE_TARGET_MODULE_MAPPING.get(known, ()))


def portable_targets(names: Collection[str], bones: Skeleton, model_type: str) -> tuple[list[str], list[str]]:
    """PEFT's `target_modules` and `target_parameters` for factors on these parameters.

    A layer that PEFT would move to the experts is named by its parameter instead, which has the same meaning.
    """
    moved = tuple(f".{name}" for name in moved_by_peft(model_type))
    stacks = [name for name in names if name in bones.experts]
    parameters = {_shortest(name, stacks, bones.experts) for name in stacks}
    matrices = [name.removesuffix(".weight") for name, shape in bones.shapes.items() if _is_matrix(name, shape, bones)]
    linear = [name.removesuffix(".weight") for name in names if name not in bones.experts]
    endings = {_shortest(name, linear, matrices) for name in linear}
    plain = {name for name in endings if not f".{name}".endswith(moved)}
    return sorted(plain), sorted(parameters | {f"{name}.weight" for name in endings - plain})


def _is_matrix(name: str, shape: tuple[int, ...], bones: Skeleton) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and bones.group(name) != "routed_experts"


def _shortest(name: str, chosen: Collection[str], all_names: Collection[str]) -> str:
    """The shortest ending of `name`, in whole components, that only chosen names have."""
    path = name.split(".")
    for length in range(1, len(path)):
        ending = ".".join(path[-length:])
        if all(other in chosen for other in all_names if f".{other}".endswith(f".{ending}")):
            return ending
    return name


def make_portable(folder: Path, model_type: str) -> None:
    """Change the settings of an adapter that was saved by PEFT so that stock PEFT loads it as it was trained."""
    moved = tuple(f".{name}" for name in moved_by_peft(model_type))
    path = folder / "adapter_config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    targets = values.get("target_modules")
    if not moved or not isinstance(targets, list):
        return
    found = [name for name in targets if f".{name}".endswith(moved)]
    if not found:
        return
    values["target_modules"] = [name for name in targets if name not in found]
    values["target_parameters"] = sorted({*(values.get("target_parameters") or ()), *(f"{n}.weight" for n in found)})
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
