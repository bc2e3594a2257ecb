"""The keys of a foreign configuration and their mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from align.errors import UserError

NO_EFFECT = "no effect on the trained weights"


class Keys:
    """A foreign configuration that is read key by key; empty values count as absent.

    Every key that is present ends in one of:

    mapped      {key: setting of the recipe}
    differs     {key: difference of the setting}; such a key is in `mapped` too
    ignored     {key: reason why it has no effect}
    not_mapped  {key: reason}
    """

    def __init__(self, path: str, values: Mapping[str, Any]):
        self.path = path
        self.values = {key: value for key, value in values.items() if value is not None}
        self.mapped: dict[str, str] = {}
        self.differs: dict[str, str] = {}
        self.ignored: dict[str, str] = {}
        self.not_mapped: dict[str, str] = {}
        self.defaults: dict[str, str] = {}
        """{key absent from the file: the tool's default, written because align's differs}."""

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, setting: str, default: Any = None) -> Any:
        """The value of a key that maps to `setting`; `default`, the tool's, if the key is absent."""
        if key in self.values:
            self.mapped[key] = setting
            return self.values[key]
        if default is not None:
            self.defaults[key] = f"{setting} is {default}, the default there"
        return default

    def number(self, key: str, setting: str, default: float | None = None) -> float | None:
        """A number. YAML 1.1 reads '1e-4' as text, so numeric texts are accepted."""
        value = self.take(key, setting, default)
        if isinstance(value, bool) or not isinstance(value, int | float | str | None):
            raise self.error(key, "not a number. Correct it")
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            raise self.error(key, "not a number. Correct it") from None

    def whole(self, key: str, setting: str, default: int | None = None) -> int | None:
        value = self.number(key, setting, default)
        if value is not None and value != int(value):
            raise self.error(key, "not a whole number. Correct it")
        return None if value is None else int(value)

    def flag(self, key: str, setting: str, default: bool = False) -> bool:
        value = self.take(key, setting, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "neither true nor false. Correct it")
        return value

    def words(self, key: str, setting: str) -> list[str]:
        """A list of texts, or one text with commas; empty if the key is absent."""
        value = self.take(key, setting)
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
        if value is not None and not all(isinstance(item, str) for item in items):
            raise self.error(key, "not a list of names. Correct it")
        return [item.strip() for item in items if item.strip()]

    def differ(self, key: str, how: str) -> None:
        if key in self.values:
            self.differs[key] = how

    def reject(self, key: str, reason: str) -> None:
        """Report a key as not mapped, if the file sets it."""
        if key in self.values:
            self.mapped.pop(key, None)
            self.not_mapped[key] = reason

    def require(self, key: str, accepted: Iterable[Any], reason: str) -> None:
        """Raise `UserError` if the file sets a value that no recipe can reproduce."""
        if key in self.values and self.values[key] not in accepted:
            raise self.error(key, reason)

    def finish(self, ignored: Mapping[str, str], reasons: Mapping[str, str]) -> None:
        """Classify the keys that have not been read. A switch that is off, such as `use_x: false`, has no effect."""
        done = {*self.mapped, *self.ignored, *self.not_mapped}
        for key, value in self.values.items():
            if key in done:
                continue
            if key in ignored:
                self.ignored[key] = ignored[key]
            elif value in (False, [], {}, ""):
                self.ignored[key] = "switched off"
            else:
                self.not_mapped[key] = reasons.get(key, "align has no setting for it")

    def error(self, key: str, what: str) -> UserError:
        value = self.values.get(key)
        return UserError(f"{self.path}: {key}: {value}: {what}.")


def comments(tool: str, keys: Keys) -> list[str]:
    """Comment lines of the recipe for every key that is not mapped one to one."""
    lines = [f"# Imported by `align import-recipe` from the {tool} file {keys.path}."]
    for title, found in (
        ("NOT MAPPED: training differs from the file in these keys", keys.not_mapped),
        ("Mapped with a difference", keys.differs),
        ("Not in the file", keys.defaults),
        ("Without effect on the trained weights", keys.ignored),
    ):
        if found:
            lines.append(f"# {title}:")
            lines += [f"#   {key}{_shown(keys.values.get(key))}: {reason}" for key, reason in found.items()]
    return lines


def _shown(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return "" if value is None else f" = {text if len(text) <= 60 else text[:57] + '...'}"
