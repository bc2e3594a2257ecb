"""Fingerprints of what determines token rows besides the source: the tokenizer and the code."""

from __future__ import annotations

import datetime
import hashlib
import json
import pickle
from functools import cache
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

import align.data
from align.run.cache import hashed

_WITHOUT_EFFECT = ("store", "prepare.py", "balance.py", "no_rows.py", "experience.py", "transfer.py")
"""Modules of `align.data` that do not determine how a row is read and encoded."""
_CLOCK = "strftime_now"
"""Function that chat templates call for today's date."""


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that determines a tokenizer's ids: vocabulary, merges, normaliser, added and special tokens,
    settings, chat template. A template that writes the date has another hash every day."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        core = hashlib.sha256(pickle.dumps(tokenizer)).hexdigest()
    else:
        # Truncation and padding keep the settings of the last call.
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        core = hashed(state)
    template = tokenizer.chat_template
    dated = _CLOCK in json.dumps(template)
    settings = {name: repr(value) for name, value in tokenizer.init_kwargs.items() if "file" not in name}
    for name in ("name_or_path", "chat_template", "tokenizer_object", "vocab", "merges"):
        settings.pop(name, None)
    return hashed(
        {
            "class": type(tokenizer).__name__,
            "core": core,
            "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
            "settings": settings,
            "template": template,
            "date": datetime.date.today().isoformat() if dated else None,
        }
    )


@cache
def code_fingerprint(*more: str) -> str:
    """Hash of the source of the modules that read and encode rows. more: further modules of the store."""
    root = Path(align.data.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if name.parts[0] not in _WITHOUT_EFFECT or name.name in ("reading.py", "shards.py", *more):
            digest.update(f"{name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def library_versions() -> list[str]:
    """Versions of the libraries that render, tokenise and judge rows."""
    return [f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2", "trl", "py3langid", "regex")]
