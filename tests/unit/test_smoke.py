"""`align smoke`: verdicts, failing lines, and the measurements that need no GPU."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from align.cli import main
from align.config import load_recipe
from align.models.forward import policy_output
from align.plan.shape import shape_of
from align.run.folder import write_json
from align.smoke import command, passes, table, training
from align.smoke.lines import LINES, Line
from align.smoke.machine import Machine
from align.smoke.small import greedy_batch, small_policy
from align.smoke.table import Check, LineResult, below, fast, worst
from tests.integration import forked

ROOT = Path(__file__).parents[2]
NAN = float("nan")


def result(*verdicts: table.Verdict, seconds: float = 1.0) -> LineResult:
    return LineResult(1, "title", [Check("what", "", "", verdict) for verdict in verdicts], seconds, 2.0, "log")


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (below("x", a=(0.5, 1.0), b=(0.1, 0.2)), "ok"),
        (below("x", a=(0.5, 1.0), b=(0.3, 0.2)), "WRONG"),
        (below("x", a=(NAN, 1.0)), "WRONG"),
        (fast("x", 10.0, 5.0, "GB/s"), "ok"),
        (fast("x", 4.0, 5.0, "GB/s"), "slow"),
        (fast("x", 4.0, 5.0, "s", at_most=True), "ok"),
        (fast("x", 6.0, 5.0, "s", at_most=True), "slow"),
        (fast("x", 6.0, None, "GB/s"), "ok"),
        (fast("x", NAN, None, "GB/s"), "WRONG"),
        (fast("x", 0.0, 5.0, "GB/s"), "WRONG"),
    ],
)
def test_verdict_of_a_check(check: Check, verdict: str) -> None:
    assert check.verdict == verdict


def test_verdict_of_a_line_is_the_worst_of_its_checks_and_its_time() -> None:
    assert result("skipped", "ok").verdict == "ok"
    assert result("ok", "slow").verdict == "slow"
    assert result("WRONG", "slow", "ok").verdict == "WRONG"
    assert result("ok", seconds=3.0).verdict == "slow"
    assert result("skipped", seconds=3.0).verdict == "skipped"
    assert result().verdict == worst([]) == "WRONG"


def test_a_row_names_what_is_expected_measured_and_estimated() -> None:
    rows = table.rows(LineResult(4, "rates", [fast("head", 3.0, 4e2, "TFLOP/s")], 1.0, 2.0, "line-4.log"))
    assert rows[0].split() == ["4", "rates", "1", "s", "of", "2", "slow"]
    assert rows[1].split() == ["head", ">=", "400", "TFLOP/s", "(estimate)", "3", "TFLOP/s", "slow"]
    assert len(rows) == 2
    wrong = table.rows(LineResult(4, "rates", [table.failed("it broke")], 1.0, 2.0, "line-4.log"))
    assert wrong[-1].split() == ["log:", "line-4.log"]


# --- lines that fail --------------------------------------------------------------------------------------

WRITE = (
    "import json, sys; json.dump({'machine': {'device': 'cpu'}, 'checks': "
    "[{'what': 'x', 'expected': '< 1', 'measured': '2', 'verdict': '%s'}]}, open(sys.argv[1], 'w'))"
)
SLEEP = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '99']); print(p.pid, flush=True); time.sleep(99)"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """{line number: Python code to run in place of that line of `align smoke`}, filled by the test."""
    codes: dict[int, str] = {}
    monkeypatch.setattr(command, "LINES", [Line(number, f"line {number}", "", 9, 9) for number in range(3)])
    monkeypatch.setattr(
        command,
        "line_command",
        lambda line, folder: [sys.executable, "-c", codes[line.number], str(folder / f"line-{line.number}.json")],
    )
    return codes


def run_smoke(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, str, dict]:
    """(exit status, table, JSON)."""
    code = 0
    try:
        main(["smoke", "--folder", str(folder), "--output", str(folder / "out.json")])
    except SystemExit as error:
        code = int(error.code or 0)
    return code, capsys.readouterr().out, json.loads((folder / "out.json").read_text())


def test_all_lines_ok_exit_with_zero(lines: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines |= {0: WRITE % "ok", 1: WRITE % "slow", 2: WRITE % "skipped"}
    code, out, written = run_smoke(tmp_path, capsys)
    assert code == 0
    assert written["verdict"] == "slow"
    assert [line["checks"][0]["verdict"] for line in written["lines"]] == ["ok", "slow", "skipped"]
    assert written["versions"]["torch"] == torch.__version__
    assert out.count("\n") == 7


def test_a_wrong_value_exits_with_one(lines: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines |= {0: WRITE % "ok", 1: WRITE % "WRONG", 2: WRITE % "ok"}
    code, out, written = run_smoke(tmp_path, capsys)
    assert code == 1
    assert written["verdict"] == "WRONG"
    assert [line["verdict"] for line in written["lines"]][1] == "WRONG"
    assert str(tmp_path / "line-1.log") in out


def test_a_line_that_fails_does_not_stop_the_others(lines: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "line-0.json").write_text("{}")  # left by an earlier run
    lines |= {0: "raise ValueError('no room')", 1: "import os; os.abort()", 2: WRITE % "ok"}
    code, out, written = run_smoke(tmp_path, capsys)
    assert code == 1
    assert [line["checks"][0]["measured"] for line in written["lines"]] == [
        "ValueError: no room",
        "it was ended by SIGABRT",
        "2",
    ]
    assert "line 2" in out


def test_a_line_that_hangs_is_ended_with_all_its_processes(
    lines: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LINES", [Line(0, "line 0", "", 0.6, 0.6)])
    lines[0] = SLEEP
    code, _, written = run_smoke(tmp_path, capsys)
    assert code == 1
    assert written["lines"][0]["checks"][0]["measured"] == "it did not end within 3 s"
    child = int((tmp_path / "line-0.log").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- measurements -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> passes.Case:
    policy = small_policy()
    return passes.Case("case", policy, greedy_batch(policy), 1.0)


def test_the_difference_sees_a_wrong_a_lost_and_an_infinite_gradient(case: passes.Case) -> None:
    right = passes.run(case, case.policy, "cpu")
    name = max(right.gradient, key=lambda key: float(right.gradient[key].norm()))

    def verdict(**changes: dict) -> str:
        return passes.difference(case, torch.bfloat16, right._replace(**changes), right).verdict

    assert verdict() == "ok"
    assert verdict(gradient={key: 1.04 * value for key, value in right.gradient.items()}) == "ok"
    assert verdict(gradient={key: 1.06 * value for key, value in right.gradient.items()}) == "WRONG"
    assert verdict(gradient=right.gradient | {name: right.gradient[name] * NAN}) == "WRONG"
    assert verdict(gradient={key: value for key, value in right.gradient.items() if key != name}) == "WRONG"
    assert verdict(logprobs=right.logprobs + 0.03) == "WRONG"


def test_the_temperature_gives_the_probability(case: passes.Case) -> None:
    for probability in (0.5, 0.999):
        temperature = passes.temperature_for(case.policy, case.batch, probability)
        probabilities = policy_output(case.policy, case.batch, temperature).logprobs[case.batch.mask.bool()].exp()
        assert probabilities.median().item() == pytest.approx(probability, abs=2e-3)


def test_an_expert_is_left_without_tokens(case: passes.Case) -> None:
    batch = passes.without_expert(case.policy, case.batch, 0)
    routed = policy_output(case.policy, batch, 1.0, replay=True).routed_experts
    assert routed is not None
    chosen = routed[torch.arange(routed.shape[1]) < batch.lengths[:, None]].flatten(0, 1).long()
    assert torch.bincount(chosen.flatten(), minlength=4).tolist()[0] == 0
    assert (chosen[:, 0] != chosen[:, 1]).all()
    gradient = passes.run(case._replace(batch=batch), case.policy, "cpu").gradient
    experts = [value for name, value in gradient.items() if name.endswith("gate_up_proj") and "experts" in name]
    assert experts
    assert all(value[0].count_nonzero() == 0 and value[1].count_nonzero() > 0 for value in experts)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H20", 148)],
)
def test_the_peak_of_a_gpu_is_the_data_sheets(name: str, peak: float) -> None:
    assert Machine("cuda", name, 1).peak_flops == peak * 1e12


def test_an_unknown_gpu_has_no_peak() -> None:
    assert Machine("cuda", "NVIDIA GeForce RTX 4090", 1).peak is None
    assert Machine("cpu", None, 0).peak is None


def test_tokens_per_second_of_printed_steps(tmp_path: Path) -> None:
    """Steps are 2 s apart, except one that is 10 s later because of a checkpoint: 4 rows of 100 tokens in 2 s."""
    settings = {"stages": {"sft": {"batch_size": 4, "data": {"max_length": 100}}}}
    write_json(tmp_path / "recipe.json", settings)
    times = [1.0, 3.0, 5.0, 15.0, 17.0]
    run = training.Run(tmp_path, [(0.5, "sft: sft"), *((t, f"  step {i}/5  loss 1") for i, t in enumerate(times))])
    assert training.tokens_per_second(run) == pytest.approx(200)


def test_the_answers_fill_a_row_of_the_gpu_recipe(tmp_path: Path) -> None:
    """An answer has more numbers than a row has tokens, and a number is at least one token."""
    path = training.recipe(Machine("cuda", "NVIDIA H200", 1), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "data/gpu/conversations.jsonl").read_text().splitlines()]
    recipe = load_recipe(path)
    assert min(len(row["completion"].split()) for row in rows) > recipe.stages["sft"].data.max_length
    assert len(rows) >= recipe.stages["ppo"].batch_size // recipe.stages["ppo"].completions_per_prompt


def test_size_of_the_gpu_recipes_model() -> None:
    recipe = load_recipe(ROOT / "align/smoke/gpu.yaml")
    shape = shape_of("smoke", recipe.model.config)
    assert shape.parameters() == pytest.approx(1.9e9, rel=0.05)
    assert shape.active == pytest.approx(0.57e9, rel=0.05)


def test_the_table_needs_no_torch() -> None:
    code = "import sys, align.smoke.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_lines_are_numbered_in_order_and_fit_their_time() -> None:
    assert [line.number for line in LINES] == list(range(9))
    assert sum(line.gpu for line in LINES) <= 18 * 60
    assert sum(line.cpu or 0 for line in LINES) <= 4 * 60


@pytest.mark.engine
@pytest.mark.slow
def test_the_cheap_lines_are_right_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line runs in a program of its own, the others in forked processes."""
    numbers = itertools.count()

    def start(*arguments: Any, **given: Any) -> Any:
        return (subprocess.Popen if next(numbers) == 0 else forked.popen)(*arguments, **given)

    forked.replace_popen(monkeypatch, command, start)
    main(["smoke", "--folder", str(tmp_path), "--only", "1", "2", "3"])
    written = json.loads((tmp_path / "smoke.json").read_text())
    checks = {check["what"]: check["verdict"] for line in written["lines"] for check in line["checks"]}
    assert checks["bfloat16, p = 0.999"] == checks["the same, new weights"] == "ok"
    assert checks["memory while asleep"] == ("ok" if torch.cuda.is_available() else "skipped")
    assert capsys.readouterr().out.count("\n") >= 15
