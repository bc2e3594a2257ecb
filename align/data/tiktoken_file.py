"""Read a vocabulary file in tiktoken's format."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from align.errors import UserError


def read_ranks(path: Path) -> dict[bytes, int]:
    """Rank of each token, from lines of `base64 rank`. Raises `UserError` with the number of an invalid line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror}); pass the released hy.tiktoken file.") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            piece = base64.b64decode(token, validate=True)
            if int(rank) != len(ranks) or piece in ranks:
                raise ValueError
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}: line {number} must be the base64 of a new token and the rank {len(ranks)}; pass the released "
                "hy.tiktoken file, unchanged."
            ) from None
        ranks[piece] = len(ranks)
    if not ranks:
        raise UserError(f"{path}: the file is empty; pass the released hy.tiktoken file.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path}: it has no token for the byte {missing[0]}; pass the released hy.tiktoken file.")
    return ranks
