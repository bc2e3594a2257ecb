"""Messages between the processes of a sandbox: frames of JSON, and plain values in them.

A value of another process is rebuilt from built-in types alone, so that a candidate's own `__eq__` or `__bool__` never
takes part in a test. Anything else travels as a handle, a number that names the object in the process that owns it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from typing import Any

LARGEST_FRAME = 1 << 24
"""Limit on the bytes of a frame."""
DEEPEST = 200
"""Limit on the nesting of a value."""
SCALARS = (bool, int, float, str)
SEQUENCES = (list, tuple, set, frozenset)

Encoded = Any
"""A JSON value: a scalar, or a list of a type's name and the encoded content."""


class NotPlainError(TypeError):
    """A value that cannot be sent: neither plain data nor an object that may travel as a handle."""


def frame(message: Any) -> bytes:
    """A message as bytes, after its length."""
    data = json.dumps(message).encode()
    if len(data) > LARGEST_FRAME:
        raise ValueError(f"a message of {len(data)} bytes exceeds {LARGEST_FRAME}")
    return struct.pack("<I", len(data)) + data


def send(descriptor: int, message: Any) -> None:
    """Write one frame."""
    view = memoryview(frame(message))
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> Any:
    """Read one frame and not a byte beyond it. Raises EOFError if the other end is closed."""
    (size,) = struct.unpack("<I", _read(descriptor, 4))
    if size > LARGEST_FRAME:
        raise ValueError(f"a message of {size} bytes exceeds {LARGEST_FRAME}")
    return json.loads(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (part := os.read(descriptor, min(size - len(data), 1 << 20))):
            raise EOFError("the other process has ended")
        data += part
    return bytes(data)


def encode(value: Any, handle: Callable[[Any], int], depth: int = 0) -> Encoded:
    """Encode a value. Instances of subclasses of a plain type are sent as the plain type.

    handle: number of an object that is not plain data; it may raise NotPlainError.
    """
    if value is None:
        return None
    for kind in SCALARS:
        if isinstance(value, kind):
            return kind(value)
    if depth > DEEPEST:
        raise NotPlainError(f"a value is nested more than {DEEPEST} levels deep")

    def inner(item: Any) -> Encoded:
        return encode(item, handle, depth + 1)

    for sequence in SEQUENCES:
        if isinstance(value, sequence):
            return [sequence.__name__, *map(inner, value)]
    if isinstance(value, dict):
        return ["dict", *([inner(key), inner(item)] for key, item in value.items())]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    return ["handle", handle(value)]


def decode(encoded: Encoded, resolve: Callable[[int], Any]) -> Any:
    """Rebuild a value. resolve: the object, or its stand-in, of a handle's number. Raises ValueError or TypeError."""
    if encoded is None or isinstance(encoded, SCALARS):
        return encoded
    if not isinstance(encoded, list) or not encoded:
        raise ValueError("not an encoded value")
    kind, *content = encoded
    match kind:
        case "list":
            return [decode(item, resolve) for item in content]
        case "tuple" | "set" | "frozenset":
            return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item, resolve) for item in content)
        case "dict":
            return {decode(key, resolve): decode(item, resolve) for key, item in content}
        case "bytes":
            return bytes.fromhex(content[0])
        case "complex":
            return complex(*content)
        case "range":
            return range(*content)
        case "handle":
            return resolve(int(content[0]))
    raise ValueError("not an encoded value")
