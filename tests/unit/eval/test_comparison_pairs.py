"""`align compare` on the output of `align eval --pairs`: values computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from align import cli
from align.errors import UserError
from align.eval.comparison.build import compare_sides
from align.eval.comparison.page import render_comparison
from align.eval.comparison.sides import read_sides
from align.eval.reward_model.pairs import ScoredPair
from tests.unit.eval.made_pairs import write_pairs_evaluation
from tests.unit.eval.test_comparison import row as row_of
from tests.unit.eval.test_comparison import write_evaluation

NAMES = ("p0", "p1", "p2", "p3", "p4", "p5")
MARGINS = {"a": (1.0, -1.0, 0.0, 2.0, 1.0, -1.0), "b": (1.0, 1.0, 1.0, -1.0, 1.0, 1.0)}
CHOSEN_LENGTHS = (9, 9, 9, 2, 2, 5)
"""The rejected completions have 5 tokens: the chosen one is the longer one in three pairs, the shorter one in two."""


def scored(margin: float | None, number: int, prompt: str | None = None) -> ScoredPair:
    """A pair of the subset math for the numbers 0 to 3, of chat for 4 and 5."""
    chosen = None if margin is None else margin + 3.0
    subset = "math" if number < 4 else "chat"
    return ScoredPair(chosen, 3.0, CHOSEN_LENGTHS[number], 5, subset, None, prompt)


def pairs_of(margins: tuple[float | None, ...]) -> list[tuple[str, ScoredPair]]:
    return [(NAMES[k], scored(margin, k, f"prompt {k}")) for k, margin in enumerate(margins)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_pairs_evaluation(tmp_path / "out", {name: pairs_of(margins) for name, margins in MARGINS.items()})


def row(comparison: dict, metric: str) -> dict:
    return row_of(comparison, metric, model="")


def test_accuracies_and_their_paired_difference(out: Path) -> None:
    """Model a is right in (1, 0, 1/2, 1, 1, 0), b in (1, 1, 1, 0, 1, 1): the differences are (0, 1, 1/2, -1, 0, 1)."""
    found = row(compare_sides(read_sides([str(out)])), "accuracy")
    assert {name: cell["mean"] for name, cell in found["sides"].items()} == pytest.approx({"a": 3.5 / 6, "b": 5 / 6})
    (difference,) = found["differences"]
    half = 2.5705818 * (0.575 / 6) ** 0.5  # t of 5 degrees of freedom; variance (3.25 - 6 / 16) / 5
    ends = [0.25 - half, 0.25 + half]
    assert [difference[key] for key in ("mean", "low", "high")] == pytest.approx([0.25, *ends])
    assert (difference["n"], difference["changed"], found["better"]) == (6, 4, 1)


def test_accuracy_of_a_subset(out: Path) -> None:
    """chat: a is right in (1, 0), b in (1, 1). Wilson's interval of 2 of 2 begins at n / (n + z²)."""
    found = row(compare_sides(read_sides([str(out)])), "accuracy/chat")
    z = 1.9599640
    assert found["label"] == "Accuracy on pairs: chat"
    assert [found["sides"]["b"][key] for key in ("mean", "low", "high")] == pytest.approx([1, 2 / (2 + z * z), 1])
    (difference,) = found["differences"]
    assert (difference["mean"], difference["n"], difference["test"]) == (0.5, 2, "mcnemar")
    assert row(compare_sides(read_sides([str(out)])), "accuracy/math")["sides"]["a"]["mean"] == 0.625


def test_pairs_of_one_prompt_are_one_cluster(tmp_path: Path) -> None:
    """b alone is right on both pairs of the first prompt: two clusters with the sums 2 and 0, so nothing is shown."""
    prompts = ("one", "one", "two", "two")
    models = {
        name: [(NAMES[k], scored(margin, k, prompts[k])) for k, margin in enumerate(margins)]
        for name, margins in {"a": (-1.0, -1.0, 1.0, 1.0), "b": (1.0, 1.0, 1.0, 1.0)}.items()
    }
    found = row(compare_sides(read_sides([str(write_pairs_evaluation(tmp_path / "out", models))])), "accuracy")
    (difference,) = found["differences"]
    half = 12.7062047 * 0.5  # t of one degree of freedom; standard error sqrt(2 / 1 · (1² + 1²)) / 4
    assert [difference["low"], difference["high"]] == pytest.approx([0.5 - half, 0.5 + half], rel=1e-6)
    assert difference["p_value"] == 1  # each of the four exchanges of whole prompts has the same size
    assert found["sides"]["a"]["method"] == "cluster-score"


def test_bias_to_length(out: Path) -> None:
    """Pairs 0 to 4 have a longer completion. a has no preference in pair 2; it prefers the longer one in pair 0 alone,
    the labels in pairs 0 and 1. b prefers it in pairs 0 to 3, the labels in pairs 0 to 2."""
    comparison = compare_sides(read_sides([str(out)]))
    found = row(comparison, "prefers_longer")
    shares = {name: (cell["mean"], cell["n"]) for name, cell in found["sides"].items()}
    assert shares == {"a": (0.25, 4), "b": (0.8, 5)}
    (difference,) = found["differences"]  # pairs 0, 1, 3, 4: a (1, 0, 0, 0), b (1, 1, 1, 0)
    assert (difference["mean"], difference["n"], found["better"]) == (0.5, 4, 0)
    figures = {row["label"]: row["sides"] for row in comparison["figures"]}
    bias = figures["Prefers the longer completion: model minus labels"]
    assert {name: cell["mean"] for name, cell in bias.items()} == pytest.approx({"a": 0.25 - 0.5, "b": 0.8 - 0.6})
    half = 1.9599640 * ((1 / 6 + 2 / 6 - 1 / 36) / 6) ** 0.5  # Bonett and Price: 0 and 1 of 4 pairs differ
    assert [bias["a"]["low"], bias["a"]["high"]] == pytest.approx([-1 / 6 - half, -1 / 6 + half])
    right = figures["Accuracy where the longer completion is right"]
    assert {name: cell["mean"] for name, cell in right.items()} == {"a": 0.5, "b": 1}
    wrong = figures["Accuracy where the shorter completion is right"]
    assert {name: cell["mean"] for name, cell in wrong.items()} == {"a": 1, "b": 0.5}
    assert figures["Mean of the subsets' accuracies"]["a"]["mean"] == pytest.approx((0.625 + 0.5) / 2)
    assert not any("shown first" in label for label in figures)  # the order of the pairs is unknown


def test_log_loss_and_calibration(out: Path) -> None:
    comparison = compare_sides(read_sides([str(out)]))
    found = row(comparison, "log_loss")
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert (found["sides"]["b"]["mean"], found["better"]) == (pytest.approx((5 * right + wrong) / 6), -1)
    (error,) = [row["sides"]["b"] for row in comparison["figures"] if row["label"] == "Calibration error"]
    confidence = 1 / (1 + math.exp(-1))
    assert error == {"mean": pytest.approx(5 / 6 - confidence), "low": None, "high": None}


def test_position_bias(tmp_path: Path) -> None:
    """The model prefers the completion shown first in both pairs, the labels in one."""
    pairs = [(n, ScoredPair(m, 0.0, 5, 5, "", first)) for n, m, first in (("p0", 1.0, True), ("p1", -1.0, False))]
    out = write_pairs_evaluation(tmp_path / "out", {"a": pairs, "b": pairs})
    comparison = compare_sides(read_sides([str(out)]))
    assert row(comparison, "prefers_first")["sides"]["a"]["mean"] == 1
    figures = {row["label"]: row["sides"]["a"]["mean"] for row in comparison["figures"]}
    assert figures["Prefers the completion shown first: model minus labels"] == 0.5


def test_the_same_pairs_of_another_evaluation_are_paired(tmp_path: Path, out: Path) -> None:
    """Another order, and another pair instead of the last one: five pairs are the same."""
    others = [*reversed(pairs_of(MARGINS["b"])[:5]), ("other", scored(1.0, 5))]
    second = write_pairs_evaluation(tmp_path / "second", {"b": others}, seed=1)
    sides = read_sides([str(out / "a"), f"new={second}"])
    assert [(side.name, side.kind) for side in sides] == [("a", "evaluation"), ("new", "evaluation")]
    comparison = compare_sides(sides)
    (difference,) = row(comparison, "accuracy")["differences"]  # (0, 1, 1/2, -1, 0)
    assert (difference["n"], difference["only_first"], difference["mean"]) == (5, 1, pytest.approx(0.1))
    settings = {row["key"]: row["values"] for row in comparison["settings"]}
    assert settings == {"checkpoint": {"a": "runs/a", "new": "runs/b"}, "pairs.seed": {"a": 0, "new": 1}}


def test_the_first_model_of_an_evaluation_is_the_first_side(tmp_path: Path) -> None:
    out = write_pairs_evaluation(tmp_path / "out", {"z": pairs_of(MARGINS["a"]), "a": pairs_of(MARGINS["b"])})
    assert [side.name for side in read_sides([str(out)])] == ["z", "a"]


def test_equal_pairs_count_each(tmp_path: Path) -> None:
    twice = [("p0", scored(margin, 0)) for margin in (1.0, -1.0)]
    out = write_pairs_evaluation(tmp_path / "out", {"a": twice, "b": twice})
    found = row(compare_sides(read_sides([str(out)])), "accuracy")
    assert (found["sides"]["a"]["mean"], found["sides"]["a"]["n"], found["differences"][0]["n"]) == (0.5, 2, 2)


def test_an_unscored_pair_is_counted(tmp_path: Path, out: Path) -> None:
    second = write_pairs_evaluation(tmp_path / "second", {"c": pairs_of((None, *MARGINS["b"][1:]))})
    found = row(compare_sides(read_sides([str(out / "a"), str(second)])), "accuracy")
    assert (found["sides"]["c"]["n"], found["sides"]["c"]["unscored"]) == (5, 1)
    assert (found["differences"][0]["n"], found["differences"][0]["only_first"]) == (5, 1)


def test_other_pairs_share_nothing(tmp_path: Path, out: Path) -> None:
    second = write_pairs_evaluation(tmp_path / "second", {"c": [("other", scored(1.0, 0))]})
    with pytest.raises(UserError, match="share no metric and no scored document"):
        compare_sides(read_sides([str(out / "a"), str(second)]))


def test_pairs_and_tasks_of_one_model(tmp_path: Path) -> None:
    """Both evaluations in one folder: a model is one side with the metrics of both."""
    out = write_evaluation(tmp_path / "out", {"a": [0, 1], "b": [1, 1]})
    write_pairs_evaluation(out, {name: pairs_of(margins) for name, margins in MARGINS.items()})
    comparison = compare_sides(read_sides([str(out)]))
    assert [side["name"] for side in comparison["sides"]] == ["a", "b"]
    assert row(comparison, "acc")["differences"][0]["mean"] == 0.5
    assert row(comparison, "accuracy")["differences"][0]["mean"] == 0.25


def test_rows_that_do_not_name_their_pair(out: Path) -> None:
    file = out / "a" / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "pair"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"a row has no 'pair', .* Run `align eval --pairs` again"):
        read_sides([str(out)])


def test_the_command_prints_and_draws_them(out: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(out.parent)
    cli.main(["compare", "out"])
    said = capsys.readouterr().out
    assert "Accuracy on pairs: math" in said
    assert "bias and calibration" in said
    page = (out.parent / "comparison.html").read_text()
    assert page == render_comparison(compare_sides(read_sides(["out"])), [])
    assert '<section id="figures"><h2>Bias and calibration</h2>' in page
