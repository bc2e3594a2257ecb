"""The table of metrics knows every metric that the code logs, and the pages made from it are current."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from align.run.charts import CHARTS
from align.run.metrics import ALL, EVALUATION, metric_info

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


@pytest.mark.parametrize("rows", [ALL, EVALUATION])
def test_no_key_is_twice_in_the_table(rows: tuple) -> None:
    keys = [metric.key for metric in rows]
    assert len(keys) == len(set(keys))


def test_the_page_is_current() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_metrics.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "run `python docs/make_metrics.py`"
