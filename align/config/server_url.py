"""URL of an HTTP server in a setting."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_server_url(text: str) -> bool:
    """True for an http or https URL with a host, and without user, query and fragment."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and text.isprintable()
    except ValueError:
        return False
    return bool(usable) and not (" " in text or parts.query or parts.fragment or parts.username)


def require_server_url(text: str, example: str) -> None:
    """Raise ValueError if `text` is not the URL of a server. example: a valid one, for the message."""
    if not is_server_url(text):
        raise ValueError(f"url '{text}' is not a valid server URL; write it like {example}")
