"""The table of metrics has every metric that the code logs, and the pages made from it are current."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

from align.eval.report.write import write_report
from align.run.charts import CHARTS
from align.run.metrics import ALL, EVALUATION, metric_info
from tests.unit.eval.made_run import write_json, write_stage

ROOT = Path(__file__).resolve().parents[3]
LOGGING = ("align/rl/*.py", "align/losses/*.py", "align/rollout/base.py", "align/models/routing.py", "reward/*.py")
"""Files whose functions return metrics by name."""
RETURNS_METRICS = re.compile(r"\bMetrics\b|dict\[str, (float|Tensor)\]")

NOT_LOGGED = {"computed", "features", "logprobs", "ref_logprobs", "values"}
"""Keys of forward-pass outputs, which are not metrics but are returned with the same types."""


def logged_keys(source: str) -> set[str]:
    """Keys of metrics in functions that return metrics and in `metrics[...]`; "name" replaces values in f-strings."""
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).split(".")[-1] == "metrics":
            found.add(text_of(node.slice))
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.returns is None:
            continue
        if not RETURNS_METRICS.search(ast.unparse(function.returns)):
            continue
        for node in ast.walk(function):
            keys: list[ast.expr | None] = []
            if isinstance(node, ast.Dict):
                keys = list(node.keys)
            elif isinstance(node, ast.DictComp):
                keys = [node.key]
            elif isinstance(node, ast.Assign):
                keys = [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
            found |= {text_of(key) for key in keys}
    return {key for key in found if key is not None}


def text_of(node: ast.expr | None) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "name" for part in node.values)
    return None


def test_every_metric_that_the_code_logs_is_in_the_table() -> None:
    keys: set[str] = set()
    for pattern in LOGGING:
        for file in ROOT.glob(pattern):
            keys |= logged_keys(file.read_text(encoding="utf-8"))
    assert {"kl", "clip_fraction", "expert_load_max", "reward/name/std", "sync/mib", "informative_groups"} <= keys
    keys = {key.replace("name_grad_norm", "policy_grad_norm") for key in keys}
    assert sorted(key for key in keys - NOT_LOGGED if metric_info(key) is None) == []


def test_the_key_of_every_row_is_found_as_that_row() -> None:
    for metric in ALL:
        assert metric_info(metric.key.replace("NAME", "my reward/2").replace("PHASE", "update")) is metric
    assert metric_info("eval_loss") is metric_info("loss")
    assert metric_info("time/reward/x") is not metric_info("time/weights")
    assert metric_info("unheard_of") is None


def test_every_charted_series_has_a_unit_and_a_chart_has_one() -> None:
    for charts in CHARTS.values():
        for chart in charts:
            metrics = [metric_info(key) for key, _ in chart.all_series]
            assert None not in metrics, chart
            assert {metric.unit for metric in metrics if metric is not None} == {chart.unit}, chart
            assert chart.unit in chart.full_title


def titles_of_the_page() -> set[str]:
    """Titles with units in the tables of docs/metrics.md, the placeholders as a regular expression."""
    found = set()
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] not in ("key", "title"):
            title, unit = cells[1:3] if cells[0].startswith("`") else cells[:2]
            found.add(title if unit == "–" else f"{title} ({unit})")
    return found


def is_on_the_page(title: str, titles: set[str]) -> bool:
    bare = title.replace(", held out", "")
    patterns = (re.escape(known) for known in titles)
    return any(re.fullmatch(re.sub("NAME|PHASE|REFERENCE|TASK|METRIC", ".+", known), bare) for known in patterns)


@pytest.mark.parametrize("kind", CHARTS)
def test_every_title_unit_and_axis_of_a_report_is_on_the_page(kind: str, tmp_path: Path) -> None:
    """A stage that has logged every metric of its kind: charts with their axes, and the final metrics."""
    keys = [key for chart in CHARTS[kind] for key, _ in chart.all_series]
    keys += ["time/generate", "speed/rollout", "reward/mine", "eval_entropy", "evaluation/sums/math"]
    write_json(tmp_path / "recipe.json", {"name": "r", "stages": {"a": {"kind": kind}}})
    write_stage(tmp_path, "a", kind, [{"step": step, **dict.fromkeys(keys, 0.5)} for step in (1, 2)])
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    write_json(tmp_path / "a" / "manifest.json", manifest | {"metrics": dict.fromkeys(keys, 0.5)})
    page = write_report(tmp_path)[2].read_text(encoding="utf-8")
    titles = titles_of_the_page()
    charts = re.findall(r"<h4>(.*?)</h4>", page)
    assert len(charts) >= len(CHARTS[kind])
    finals = re.findall(r'<th scope="row">(.*?)</th>', page.partition("Final metrics (")[2].partition("</table>")[0])
    assert len(finals) == len(dict.fromkeys(keys))
    assert [title for title in [*charts, *finals] if not is_on_the_page(title, titles)] == []
    axes = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    step = "Iteration" if kind == "ppo" else "Optimizer step"
    assert step in titles
    assert len(axes) == len(charts)
    assert [svg for svg in axes if f">{step}</text>" not in svg and ">Iteration</text>" not in svg] == []


@pytest.mark.parametrize("title", ["Loss (nats)", "Reward", "Learningrate", "Speed of (tokens/s)"])
def test_a_title_that_is_not_on_the_page_is_noticed(title: str) -> None:
    assert not is_on_the_page(title, titles_of_the_page())


@pytest.mark.parametrize("rows", [ALL, EVALUATION])
def test_no_key_is_twice_in_the_table(rows: tuple) -> None:
    keys = [metric.key for metric in rows]
    assert len(keys) == len(set(keys))


def test_the_page_is_current() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_metrics.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "run `python docs/make_metrics.py`"
