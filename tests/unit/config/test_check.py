"""`align check` judges a recipe as `align run` would take it."""

from __future__ import annotations

import pytest

from align.cli import main


def test_changes_are_judged_with_the_recipe(capsys) -> None:
    main(["check", "tiny", "stages.dpo.beta=0.2"])
    assert capsys.readouterr().out == "tiny: ok\n"
    with pytest.raises(SystemExit) as ended:
        main(["check", "tiny", "quickstart", "stages.dpo.beta=-1"])
    problems = capsys.readouterr().err
    assert ended.value.code == 2
    assert problems.count("stages.dpo.beta") == 2


def test_changes_alone_are_no_recipe(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "stages.dpo.beta=0.2"])
    assert ended.value.code == 2
    assert "put a recipe's name or file in front" in capsys.readouterr().err
