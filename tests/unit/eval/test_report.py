"""The run report from small hand-made run folders."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.eval.report import plots
from align.eval.report.formatting import duration, number
from align.eval.report.headline import headline
from align.eval.report.plots import stage_plots
from align.eval.report.write import build_report, read_metrics, write_report
from align.run.charts import CHARTS
from align.run.metrics import PHASES
from tests.unit.eval.made_run import STAGES, write_json, write_run, write_stage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a-run")


def metric(report: dict, key: str) -> dict:
    return next(m for m in report["evaluations"][0]["metrics"] if m["key"] == key)


def test_means_and_paired_differences_by_hand(run: Path) -> None:
    report = build_report(run)
    scores = metric(report, "scores")
    assert scores["models"]["base"]["mean"] == 1.5
    assert scores["models"]["ppo"] == pytest.approx(scores["models"]["ppo"] | {"mean": 4 / 3, "n": 3, "unscored": 1})
    differences = {(d["model"], d["against"]): d for d in scores["differences"]}
    assert set(differences) == {("sft", "base"), ("ppo", "base"), ("ppo", "sft")}
    # Every prompt gains exactly 1, so the interval has no width although the scores vary.
    assert [differences["sft", "base"][key] for key in ("mean", "low", "high")] == [1.0, 1.0, 1.0]
    # Three prompts are scored by both: (0 - 1, 1.5 - 2, 2.5 - 3).
    assert differences["ppo", "sft"]["mean"] == pytest.approx(-2 / 3)
    assert differences["ppo", "sft"]["n"] == 3
    assert metric(report, "preference")["models"]["ppo"]["mean"] == 0.75
    assert metric(report, "preference")["models"]["ppo"]["low"] is None
    assert report["total_seconds"] == 150.0


def test_values_that_are_not_finite_have_no_mean_and_are_named(run: Path) -> None:
    report = build_report(run)
    kl = metric(report, "kl")
    assert kl["label"] == "KL to sft (nats per completion)"
    assert (kl["models"]["ppo"]["mean"], kl["models"]["ppo"]["not_finite"]) == (None, 1)
    assert report["stages"][0]["metrics"]["broken"] == "not finite"
    notes = [
        "KL to sft (nats per completion): 1 of 4 values of ppo are not finite, so it has no mean.",
        "The stage 'sft' has metrics that are not finite: broken.",
    ]
    assert set(notes) <= set(report["notes"])
    for path in write_report(run)[1:]:
        text = path.read_text().replace("&#x27;", "'")
        assert text.count("not finite") >= 4  # the cell, the metric of the stage, both notes
        for note in notes:
            assert note in text


def test_a_broken_value_is_not_a_better_model(run: Path) -> None:
    results = json.loads((run / "evaluate" / "results.json").read_text())
    results["models"]["ppo"]["scores"][0] = math.inf
    write_json(run / "evaluate" / "results.json", results)
    report = build_report(run)
    difference = next(d for d in metric(report, "scores")["differences"] if d["model"] == "ppo")
    assert (difference["mean"], difference["not_finite"]) == (None, 1)
    assert "reward-model score not finite" in report["verdict"]


def test_tasks_are_columns_and_have_their_counts(run: Path) -> None:
    report = build_report(run)
    column = metric(report, "task/sums/math")
    assert column["label"] == "sums: math"
    assert column["models"]["base"]["mean"] == 0.25
    assert (column["models"]["ppo"]["mean"], column["models"]["ppo"]["unscored"]) == (pytest.approx(2 / 3), 1)
    (difference,) = column["differences"]  # over the three prompts that both have: (1 - 0, 0 - 0, 1 - 1)
    assert (difference["mean"], difference["n"]) == (pytest.approx(1 / 3), 3)
    markdown, page = (path.read_text() for path in write_report(run)[1:])
    assert "| sums | ppo | math | 0.667 | 0.250 | 3 | 1 | 1 | 2 | 17.50 |" in markdown
    assert "greedy decoding, at most 256 new tokens" in markdown
    assert "greedy decoding, at most 256 new tokens" in page
    assert [sample["title"] for sample in report["evaluations"][0]["samples"]] == [
        "Prompt 1",
        *(f"sums, prompt {n}" for n in (1, 2, 3, 4)),
    ]
    assert report["evaluations"][0]["samples"][-1]["scores"] == {"base": 0.0}  # ppo has none on the last prompt
    assert "5 of 5 stored prompts" in page


def test_reading_changes_nothing_and_is_reproducible(run: Path) -> None:
    before = sorted(run.rglob("*"))
    assert build_report(run, generated="now") == build_report(run, generated="now")
    assert sorted(run.rglob("*")) == before


def test_the_three_files_agree(run: Path) -> None:
    paths = write_report(run)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert not list(run.glob("*.tmp"))
    report = json.loads(paths[0].read_text())
    assert report == build_report(run, generated=report["generated"])
    markdown, page = paths[1].read_text(), paths[2].read_text()
    for column in report["evaluations"][0]["metrics"]:
        cells = list(column["models"].values()) + column["differences"]
        assert cells
        for cell in cells:
            assert number(cell["mean"]) in markdown
            assert number(cell["mean"]) in page
            if cell["low"] is not None:
                ends = f"[{number(cell['low'])}, {number(cell['high'])}]"
                assert ends in markdown
                assert ends in page
    for text in (duration(150.0), "0123456789ab", "too_long", "90.0%"):
        assert text in markdown
        assert text in page


class Page(HTMLParser):
    """Collects tags, attributes, ids and references of a page, and checks that tags are balanced."""

    VOID = {"meta", "img", "br", "hr", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escapes_samples_and_loads_nothing(run: Path) -> None:
    text = write_report(run)[2].read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "img", "link", "iframe", "object", "metadata", "b>run"} & set(page.tags)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text
    assert "a &lt;b&gt;run&lt;/b&gt;" in text
    assert "\x00" not in text
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    names = [name for name, _ in page.attributes]
    assert "src" not in names
    assert not [name for name in names if name.startswith("on")]
    ids = Counter(value for name, value in page.attributes if name == "id")
    assert max(ids.values()) == 1
    targets = {value[1:] for name, value in page.attributes if name == "href" and value}
    targets |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets <= set(ids)
    assert page.tags["svg"] >= 10


def test_markdown_fences_hold_a_sample_with_backticks(run: Path) -> None:
    markdown = write_report(run)[1].read_text()
    assert "````text\n<script>alert('x')</script>" in markdown


def test_plots_are_deterministic_and_scale(run: Path) -> None:
    rows = read_metrics(run / "ppo" / "metrics.jsonl")
    first, second = stage_plots("ppo", rows, "a"), stage_plots("ppo", rows, "a")
    assert first == second
    assert "KL of the policy to the reference (nats per completion)" in [plot.title for plot in first]
    assert [plot.title for plot in first][-1] == "Time per iteration (s)"
    # The time of a reward is a part of the phase `score` and must not be stacked on top of it.
    assert ">score</text>" in first[-1].svg
    assert "reward" not in first[-1].svg
    for plot in first:
        head = plot.svg[: plot.svg.index(">")]
        assert "viewBox" in head
        assert "width" not in head
        assert "<text" in plot.svg


def test_a_curve_with_values_that_are_not_finite_says_so() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}]
    (plot,) = stage_plots("sft", rows, "a")
    assert plot.caption == "not finite, not drawn: 2 values"


def test_a_constant_curve_has_ticks_that_differ() -> None:
    """A running mean of equal numbers differs by rounding, which would be all that the axis shows."""
    (plot,) = stage_plots("sft", [{"step": step, "loss": 0.6} for step in range(80)], "a")
    assert plot.caption == ""
    ticks = re.findall(r">(0\.\d+)</text>", plot.svg)
    assert len(ticks) == len(set(ticks)) >= 3


def test_legends_stay_within_the_figure() -> None:
    keys = {key for chart in CHARTS["ppo"] for key, _ in chart.all_series} | {f"time/{phase}" for phase in PHASES}
    rows = [{"step": step, **dict.fromkeys(keys, step)} for step in range(3)]
    drawn = [plots._times(rows), *(plots._curves(chart, rows, "ppo") for chart in CHARTS["ppo"])]
    legends = 0
    for figure, _ in filter(None, drawn):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        if (legend := axes.get_legend()) is not None:
            legends += 1
            box = legend.get_window_extent()
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
    assert legends >= 5


def test_a_run_without_evaluation_says_so(run: Path) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    del recipe["stages"]["evaluate"]
    write_json(run / "recipe.json", recipe)
    for folder in ("evaluate", "ppo"):
        (run / folder / "manifest.json").unlink()
    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81, "score_me')
    (run / "dpo" / "metrics.jsonl").unlink()
    (run / "dpo" / "manifest.json").unlink()
    report = build_report(run)
    assert {s["name"]: s["status"] for s in report["stages"]} == {
        "sft": "finished",
        "rm": "finished",
        "dpo": "not run",
        "ppo": "unfinished",
    }
    assert report["stages"][-1]["metrics"]["score_mean"] == pytest.approx(80 / 9)
    for path in write_report(run)[1:]:
        text = path.read_text().replace("&#x27;", "'")
        assert "The recipe has no evaluate stage, so no models are compared." in text
        assert "The stage 'dpo' has not been run." in text


def test_a_comparison_of_models_that_were_trained_again_is_marked(run: Path) -> None:
    manifest = run / "evaluate" / "manifest.json"
    write_json(manifest, json.loads(manifest.read_text()) | {"parent_ids": {"ppo": "of an earlier run"}})
    reason = "its parent 'ppo' was run again after it"
    report = build_report(run)
    assert report["evaluations"][0]["stale"] == report["stages"][-1]["stale"] == reason
    assert report["verdict"].startswith(f"Stale, not of the present models: {reason}; ppo against base: ")
    markdown, page = (path.read_text().replace("&#x27;", "'") for path in write_report(run)[1:])
    assert f"**Stale: {reason}. The numbers are not of the present models.**" in markdown
    assert f"Stale: {reason}. The numbers are not of the present models." in page
    assert "Stale, not of the present models" in "\n".join(headline(run))


def test_the_base_model_comes_first(run: Path) -> None:
    write_stage(run, "base", "base", [])
    write_stage(run, "left_over", "sft", [])
    write_report(run)
    names = [stage["name"] for stage in json.loads((run / "report.json").read_text())["stages"]]
    assert names == ["base", *STAGES, "left_over"]


def test_a_recipe_that_has_only_started(tmp_path: Path) -> None:
    write_json(tmp_path / "recipe.json", {"name": "new", "stages": {"evaluate": {"kind": "evaluate"}}})
    report = build_report(tmp_path)
    assert report["total_seconds"] == 0
    assert "The evaluate stage has no results yet, so no models are compared." in report["notes"]
    assert len(write_report(tmp_path)) == 3


def test_a_manifest_without_recipe_is_enough(run: Path) -> None:
    (run / "recipe.json").unlink()
    report = build_report(run)
    assert report["name"] == "a-run"
    assert {stage["kind"] for stage in report["stages"]} == set(STAGES.values())


def test_resumed_metrics_keep_the_later_value(tmp_path: Path) -> None:
    lines = [
        '{"step": 2, "loss": 5}',
        '{"step": 1, "loss": 9}',
        "torn {",
        '{"step": 2, "loss": 4}',
        '{"loss": 1}',
        "7",
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2, "eval_loss": 6}']))
    expected = [{"step": 1, "loss": 9}, {"step": 2, "loss": 4, "eval_loss": 6}]
    assert read_metrics(tmp_path / "metrics.jsonl") == expected


def test_errors_name_the_file(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        build_report(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        build_report(tmp_path / "empty")
    (run / "sft" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"sft/manifest\.json: not valid JSON"):
        build_report(run)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345, "12,345"),
        (-0.12345, "−0.123"),
        (3.14159, "3.14"),
        (2.5e-6, "2.5e-06"),
        (None, "–"),
        (math.nan, "not finite"),
    ],
)
def test_numbers(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(8.24, "8.2 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (None, "–")])
def test_durations(seconds: Any, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("package", ["eval", "reward", "recipes"])
def test_linked_packages_refuse_their_other_name(package: str) -> None:
    path = Path(__file__).resolve().parents[3] / package / "__init__.py"
    spec = importlib.util.spec_from_file_location(package, path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"import it as align.{package}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_headline_of_a_run_is_the_reports_table(run: Path) -> None:
    write_report(run)
    lines = headline(run)
    (row,) = [line for line in lines if line.strip().startswith("Reward-model score")]
    cells = [metric(build_report(run), "scores")["models"][model] for model in ("base", "sft", "ppo")]
    assert re.findall(r"−?\d+\.\d+ \[", row) == [f"{number(cell['mean'])} [" for cell in cells]
    heads = next(line for line in lines if "base" in line)
    assert heads.split() == ["base", "sft", "ppo"]
    for name, cell in zip(heads.split(), cells, strict=True):
        assert row[heads.index(name) :].startswith(number(cell["mean"]))
    assert any(line.strip().startswith("ppo against base: reward-model score") for line in lines)
    (run / "evaluate" / "results.json").unlink()
    write_report(run)
    assert headline(run) == []
    (run / "report.json").unlink()
    assert headline(run) == []
