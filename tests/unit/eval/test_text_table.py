"""Tables and sentences for terminals of several widths, and the table at the end of a run at 80 and 120 columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.eval.report.headline import headline
from align.eval.report.text_table import text_table, wrapped

ROWS = [
    ["", "base", "sft", "ppo"],
    ["Reward-model score", "−3.02 [−3.19, −2.59]", "1.53 [0.677, 2.08]", "2.75 [2.28, 2.99]"],
    ["Completions that end with a stop token", "0.031 [0.006, 0.157]", "0.812 [0.647, 0.911]", "1.00 [0.893, 1.00]"],
]


def test_a_wide_terminal_has_one_line_per_row() -> None:
    assert text_table([["a", "bb"], ["ccc", "d"]], 80) == ["a    bb", "ccc  d"]
    assert text_table(ROWS, None) == text_table(ROWS, 110)
    assert len(text_table(ROWS, 110)) == 3


def test_the_first_column_is_wrapped_before_the_others_are_folded() -> None:
    assert text_table(ROWS, 92) == [
        "                              base                  sft                   ppo",
        "Reward-model score            −3.02 [−3.19, −2.59]  1.53 [0.677, 2.08]    2.75 [2.28, 2.99]",
        "Completions that end with a   0.031 [0.006, 0.157]  0.812 [0.647, 0.911]  1.00 [0.893, 1.00]",
        "stop token",
    ]


def test_columns_that_do_not_fit_are_in_a_block_below() -> None:
    assert text_table(ROWS, 80, indent="  ") == [
        "                              base                  sft",
        "  Reward-model score          −3.02 [−3.19, −2.59]  1.53 [0.677, 2.08]",
        "  Completions that end with   0.031 [0.006, 0.157]  0.812 [0.647, 0.911]",
        "  a stop token",
        "",
        "                              ppo",
        "  Reward-model score          2.75 [2.28, 2.99]",
        "  Completions that end with   1.00 [0.893, 1.00]",
        "  a stop token",
    ]


def test_a_column_that_is_wider_than_the_terminal_is_a_block_of_its_own() -> None:
    lines = text_table([["", "x" * 50, "y"], ["metric", "1", "2"]], 30)
    assert lines == [f"        {'x' * 50}", "metric  1", "", "        y", "metric  2"]


def test_a_number_and_its_interval_stay_on_one_line() -> None:
    sentence = "ppo against dpo: reward-model score +1.22 [0.673, 2.02], token F1 0 [−0.055, 0.055] (includes zero)"
    assert wrapped(sentence, 50, indent="  ") == [
        "  ppo against dpo: reward-model score",
        "    +1.22 [0.673, 2.02], token F1",
        "    0 [−0.055, 0.055] (includes zero)",
    ]
    assert wrapped(sentence, None, indent="  ") == [f"  {sentence}"]


@pytest.mark.parametrize(("width", "blocks"), [(80, 2), (120, 1), (None, 1)])
def test_the_table_at_the_end_of_a_run_fits_the_terminal(tmp_path: Path, width: int | None, blocks: int) -> None:
    """The four models and six metrics of `align run tiny`."""
    models = ["base", "sft", "dpo", "ppo"]
    kl = {"base": (53.11, 49.77, 56.46), "sft": (1.7e-06, 2.2e-07, 3.9e-06), "dpo": (2.38, 1.69, 3.09)}
    cells = {
        "Reward-model score": dict.fromkeys(models, (-3.02, -3.19, -2.59)),
        "KL to sft (nats per completion)": kl | {"ppo": (4.16, 3.30, 4.99)},
        "Completions that end with a stop token (share)": dict.fromkeys(models, (0.031, 0.006, 0.157)),
    }
    metrics = [
        {"label": label, "models": {m: dict(zip(("mean", "low", "high"), cell)) for m, cell in by_model.items()}}
        for label, by_model in cells.items()
    ]
    verdict = "ppo against base: reward-model score +5.77 [5.30, 6.08], token F1 (share) +0.093 [0.066, 0.125]; ppo."
    report = {"evaluations": [{"models": models, "metrics": metrics}], "verdict": verdict}
    (tmp_path / "report.json").write_text(json.dumps(report))
    lines = headline(tmp_path, width)
    assert max(map(len, lines)) <= (width or 200)
    text = "\n".join(lines)
    heads = [word for line in lines for word in line.split() if word in models and line.split()[0] in models]
    assert heads[:4] == models
    assert text.count("Reward-model score") == blocks
    assert text.count("−3.02 [−3.19, −2.59]") == 4
    assert text.count("1.7e-06 [2.2e-07, 3.9e-06]") == 1
    assert "+5.77 [5.30, 6.08]" in text
