"""Base of all sections of a recipe, and the settings of an earlier version.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python


class RuntimeSetting:
    """Marks a setting that does not affect a stage's result; it may change when a run is resumed."""


@dataclass(frozen=True)
class EarlierDefault:
    """Marks a setting that earlier versions did not have, if they behaved unlike its default. value: as they did."""

    value: Any


RUNTIME = RuntimeSetting()
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Location = Annotated[str, Field(min_length=1)]
"""A file, a folder, or a name that a library resolves."""


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without a NaN or an infinity at any depth, which pydantic lets through in values of any type."""
    parts = list(values.items())
    for path, value in parts:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} is {value}; set a finite number")
        if isinstance(value, dict):
            parts += [(f"{path}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            parts += [(f"{path}[{number}]", item) for number, item in enumerate(value)]
    return values


FiniteValues = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Settings of a library, or of a model's config.json, without NaN and infinities."""


class Section(BaseModel):
    """Base of every section of a recipe. Frozen; refuses unknown keys and values of another type ("8" for 8)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __hash__(self) -> int:
        """Hash of the values. pydantic's own fails for values that are lists or dicts."""
        return hash((type(self), self.model_dump_json()))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy with other values, which are not validated. Raises `TypeError` for a key that the section lacks."""
        if unknown := set(update or ()) - set(type(self).model_fields):
            raise TypeError(f"{type(self).__name__} has no key {', '.join(sorted(unknown))}")
        return super().model_copy(update=update, deep=deep)


RENAMED_KEYS = {"algorithm": "advantage_estimator"}
"""{key of an earlier version: its current name}."""
RENAMED_VALUES = {("advantage_estimator", "ppo"): "gae"}
"""{(current key, value of an earlier version): its current value}."""


def renamed(key: str, value: Any) -> tuple[str, Any]:
    """Current name and value of a setting written by an earlier version; other settings are returned unchanged."""
    if key not in RENAMED_KEYS:
        return key, value
    new = RENAMED_KEYS[key]
    return new, RENAMED_VALUES.get((new, value), value) if isinstance(value, str) else value


def result_settings(part: Section, values: dict[str, Any]) -> dict[str, Any]:
    """The settings that affect a stage's result: `values` without those marked `RUNTIME`.

    part    the section in the current recipe
    values  the section's values as JSON, from the current recipe or from an earlier run's manifest

    A setting missing from `values` did not exist in the version that wrote them. Such a setting gets its
    default, with which that version agrees, or its `EarlierDefault`. Renamed settings get their current names.
    """
    kept, fields = {}, type(part).model_fields
    values = dict((key, value) if key in fields else renamed(key, value) for key, value in values.items())
    unknown = [name for name, field in fields.items() if name not in values and not field.is_required()]
    defaults = to_jsonable_python({name: fields[name].get_default(call_default_factory=True) for name in unknown})
    marked = [(name, mark) for name in unknown for mark in fields[name].metadata if isinstance(mark, EarlierDefault)]
    defaults |= {name: mark.value for name, mark in marked}
    for name, value in {**defaults, **values}.items():
        field, inner = fields.get(name), getattr(part, name, None)
        if field is not None and any(isinstance(mark, RuntimeSetting) for mark in field.metadata):
            continue
        if isinstance(inner, Section) and isinstance(value, dict):
            value = result_settings(inner, value)
        elif isinstance(inner, list) and isinstance(value, list):
            pairs = zip_longest(inner[: len(value)], value)
            value = [result_settings(i, v) if isinstance(i, Section) and isinstance(v, dict) else v for i, v in pairs]
        kept[name] = value
    return kept
