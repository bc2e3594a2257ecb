"""`align check` judges a recipe as `align run` would take it."""

from __future__ import annotations

import pytest

from align.cli import main
from align.config import load_recipe
from align.errors import UserError


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


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ("stages.sft.bach_size=8", "did you mean 'batch_size'?"),
        ("stages.sft.max_length=8", "did you mean 'data.max_length'?"),
        ("stages.ppo.learning_rate=1e-4", "did you mean 'critic.learning_rate' or 'optimizer.learning_rate'?"),
        ("stages.ppo.advantage=grpo", "known keys are algorithm, batch_size"),
        ("stages.dpo.lora.r=8", "known keys are alpha, attention, dropout, experts, rank"),
    ],
)
def test_an_unknown_key_is_met_with_what_may_have_been_meant(change: str, hint: str) -> None:
    """A near spelling, or a section that has the key; nothing far-fetched, which would change something else."""
    with pytest.raises(UserError) as error:
        load_recipe("tiny", [change])
    assert hint in str(error.value)
