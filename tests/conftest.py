"""No test may load from a hub, and a configuration built by a test has only keys that are read."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CACHE = tempfile.TemporaryDirectory(prefix="align-cache-")
os.environ["ALIGN_CACHE"] = _CACHE.name

TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def known_configuration_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `HunYuanConfig(...)` in a test refuse unknown keys, which transformers keeps and nothing reads.

    Configurations read from files are not affected. The module is not imported here, so that tests without a model
    start fast.
    """
    if module := sys.modules.get("align.models.hunyuan.configuration"):
        config = module.HunYuanConfig
        build = config.__init__

        def checked(self: Any, *args: Any, **values: Any) -> None:
            if sys._getframe(1).f_code.co_filename.startswith(TESTS):
                unknown = [key for key in values if key not in config.__dataclass_fields__ and not hasattr(config, key)]
                if unknown:
                    raise TypeError(f"HunYuanConfig has no key {', '.join(unknown)}")
            build(self, *args, **values)

        monkeypatch.setattr(config, "__init__", checked)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium for the tests of a module; see `tests.browsers`."""
    from tests.browsers import chromium

    with chromium() as found:
        yield found
