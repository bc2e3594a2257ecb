"""Classes with a mix-in, for modules that exist already."""

from __future__ import annotations

_MIXED: dict[tuple[type, type], type] = {}


def mixed(mix_in: type, base: type) -> type:
    """A class with the name and module of `base`, with `mix_in` before it; the same for the same two classes."""
    if issubclass(base, mix_in):
        return base
    if (mix_in, base) not in _MIXED:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _MIXED[mix_in, base] = type(base.__name__, (mix_in, base), names)
    return _MIXED[mix_in, base]
