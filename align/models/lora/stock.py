"""Adapters loaded by PEFT itself, the reference for every other implementation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.models.lora.adapters import AnyModel


def load_adapter(model: AnyModel, folder: Path) -> AnyModel:
    """Wrap the model with a saved adapter, for inference."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


@contextmanager
def with_adapter(model: AnyModel, folder: Path) -> Iterator[AnyModel]:
    """The model with a saved adapter; afterwards the model has its own layers again."""
    wrapped = load_adapter(model, folder)
    try:
        yield wrapped
    finally:
        wrapped.unload()
