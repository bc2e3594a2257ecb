"""Classes that add a mix-in to the class of an existing module."""

from __future__ import annotations

_MIXED: dict[tuple[type, type], type] = {}


def mixed(mix_in: type, base: type) -> type:
    """Subclass of (`mix_in`, `base`) with the name and module of `base`. Equal arguments give the same class."""
    if issubclass(base, mix_in):
        return base
    if (mix_in, base) not in _MIXED:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _MIXED[mix_in, base] = type(base.__name__, (mix_in, base), names)
    return _MIXED[mix_in, base]
