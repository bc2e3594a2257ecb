"""No test may load from a hub, and a configuration built by a test has only keys that are read."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CACHE = tempfile.TemporaryDirectory(prefix="align-cache-")
os.environ["ALIGN_CACHE"] = _CACHE.name

TESTS = str(Path(__file__).parent)
LONG = {"distributed", "engine", "slow"}
"""Marks of tests that take more than about ten seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first, so that no worker is left with one of them while the others have finished.

    The order is tests/integration, other files by their number of tests with a mark in `LONG`, then all other files.
    """
    long = Counter(item.path for item in items if any(item.get_closest_marker(mark) for mark in LONG))
    integration = Path(TESTS) / "integration"
    items.sort(key=lambda item: (not item.path.is_relative_to(integration), -long[item.path]))


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
