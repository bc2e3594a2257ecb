"""A sample of the proof of the loss masks; `python -m tests.masks` runs all of it."""

from __future__ import annotations

import pytest

from tests.masks.proof import TEMPLATES, prove


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_assistants_texts_and_their_ends_are_in_the_loss(name):
    report = prove(name, 4, seed=1)
    assert report.wrong == []
    assert report.conversations == 4
    assert report.turns or report.refused
