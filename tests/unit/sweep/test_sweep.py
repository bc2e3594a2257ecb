"""`align sweep` with made-up runs: their stages, the shared stages, and the best setting."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from align import cli
from align.config import load_recipe
from align.errors import Stopped, UserError
from align.run import interrupt
from align.run.folder import write_json
from align.run.manifest import result_id, stage_settings
from align.sweep import runner
from align.sweep.axes import Axis, Range, read_settings, split_values
from align.sweep.plan import Plan, Run, distinct_stages, identities
from align.sweep.results import Value, default_metric, sweep_content, write_sweep_report
from align.sweep.runner import Settings, run_sweep

BETAS = ["stages.dpo.beta=0.05,0.1,0.3"]


def plan_of(*settings: str, seeds: int = 1) -> Plan:
    fixed, axes = read_settings(settings)
    return Plan("tiny", fixed, load_recipe("tiny", fixed), axes, seeds)


@pytest.fixture(autouse=True)
def no_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the sweep's page, which takes seconds to draw, in the tests that do not read it."""
    if "capsys" not in request.fixturenames:
        monkeypatch.setattr(runner, "write_sweep_report", sweep_content)


class MadeRuns:
    """Stands for `align run`: finishes every stage that is not finished, and records their names.

    score: dpo's score on ten prompts, from beta and the seed's number. fails: called before a stage; may raise.
    """

    def __init__(self, score: Any = None) -> None:
        self.done: list[tuple[str, str]] = []
        self.score = score or (lambda beta, seed: beta)
        self.fails: Any = lambda run, name: None
        self.status: dict[str, int] = {}

    def __call__(self, run: Run, recipe: Path) -> int:
        loaded = load_recipe(recipe, run.overrides)
        assert loaded == run.recipe
        write_json(run.folder / "recipe.json", loaded.model_dump(mode="json"))
        for name in ["base", *loaded.stages]:
            folder = run.folder / name
            if (folder / "manifest.json").is_file():
                continue
            self.fails(run, name)
            self.done.append((f"{run.point.name}/{run.seed}", name))
            stage = loaded.stages.get(name)
            parents = [] if stage is None else list(dict.fromkeys(r.name for r in stage.references()))
            manifest = {
                "stage": name,
                "kind": stage.kind if stage else "base",
                "status": "finished",
                "config": stage_settings(loaded, name),
                "parent_ids": {parent: result_id(run.folder / parent) for parent in parents},
                "run": str(run.folder),
            }
            write_json(folder / "manifest.json", manifest)
            if name == "evaluate":
                value = self.score(loaded.stages["dpo"].beta, run.seed)
                scores = {"sft": [0.0] * 10, "dpo": [value + 0.01 * n for n in range(10)]}
                models = {model: {"scores": values} for model, values in scores.items()}
                prompts = [{"prompt": str(n), "completions": {}} for n in range(10)]
                write_json(folder / "results.json", {"models": models, "baseline": "sft", "prompts": prompts})
        return self.status.get(f"{run.point.name}/{run.seed}", 0)

    def counts(self) -> dict[str, int]:
        names = [name for _, name in self.done]
        return {name: names.count(name) for name in dict.fromkeys(names)}


def sweep(plan: Plan, folder: Path, made: MadeRuns, *, metric: str | None = "dpo/scores", **how: Any) -> list[str]:
    return run_sweep(plan, folder, Settings(metric, 0, None), start=made, say=lambda line: None, **how)


# --- swept settings ------------------------------------------------------------------------------------------


def test_values_are_separated_by_commas_outside_of_lists_and_quotes() -> None:
    assert split_values("0.05, 0.1,1e-3") == ["0.05", "0.1", "1e-3"]
    assert split_values("[a, b],[c]") == ["[a, b]", "[c]"]
    assert split_values("{kind: x, to: [1, 2]}, null") == ["{kind: x, to: [1, 2]}", "null"]
    assert split_values("'a, b',c") == ["'a, b'", "c"]


def test_settings_with_one_value_are_overrides() -> None:
    fixed, axes = read_settings(["name=x", "a.b=1,2", "c=[1, 2]", "d=1e-4..1e-2:log", "e=1..8", "f=runs/../x"])
    assert fixed == ["name=x", "c=[1, 2]", "f=runs/../x"]
    assert axes == [Axis("a.b", ("1", "2")), Range("d", 1e-4, 1e-2, False, True), Range("e", 1, 8, True, False)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["beta"], "not of the form KEY=VALUE,VALUE"),
        (["a=1,2", "a=3"], "the key is written twice"),
        (["a=1,1"], "a value is written twice"),
        (["a=3..1"], "from a lower to a higher number"),
        (["a=0..1:log"], "above 0 with :log"),
        (["a=1,[2"], "not valid YAML"),
    ],
)
def test_wrong_settings_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(settings)


# --- shared stages -------------------------------------------------------------------------------------------


def test_a_grid_has_all_combinations_under_names_of_their_own(tmp_path: Path) -> None:
    plan = plan_of("stages.dpo.beta=0.1,0.3", "stages.sft.max_steps=5,6,7")
    names = [point.name for point in plan.grid()]
    assert names[:3] == ["beta-0.1_max_steps-5", "beta-0.1_max_steps-6", "beta-0.1_max_steps-7"]
    assert len(set(names)) == 6
    twice = plan_of("stages.sft.max_steps=5,6", "stages.pretrain.max_steps=7,8")
    assert twice.grid()[0].name == "sft-max_steps-5_pretrain-max_steps-7"


def test_equal_stages_are_counted_once(tmp_path: Path) -> None:
    plan = plan_of("stages.dpo.beta=0.1,0.3", "stages.sft.max_steps=5,6", seeds=2)
    runs = [run for point in plan.grid() for run in plan.runs(point, tmp_path)]
    # Seeds change the stages that sft affects: sft, the reward model, dpo and ppo; sft has 2 settings and 2 seeds.
    assert distinct_stages(runs) == {
        "base": 1,
        "pretrain": 1,
        "sft": 4,
        "pairs": 1,
        "reward_model": 4,
        "dpo": 8,
        "ppo": 8,
        "evaluate": 8,
    }


def test_seeds_change_the_affected_stages_and_not_the_evaluation(tmp_path: Path) -> None:
    plan = plan_of(*BETAS, "seed=7", seeds=3)
    assert plan.seed_overrides(0) == []
    assert plan.seed_overrides(2) == ["stages.dpo.seed=9", "stages.ppo.seed=9"]
    assert plan_of(seeds=2).seed_overrides(1) == ["seed=1"]
    assert plan_of("dtype=float32,bfloat16", seeds=2).seed_overrides(1) == ["seed=1"]


def test_settings_that_may_change_on_resume_do_not_change_a_stage() -> None:
    """Gradient checkpointing gives the same result; another batch size does not."""
    first = identities(load_recipe("tiny"))
    other = identities(load_recipe("tiny", ["stages.sft.gradient_checkpointing=true"]))
    assert first == other
    other = identities(load_recipe("tiny", ["stages.sft.batch_size=16"]))
    assert [name for name in first if first[name] != other[name]] == ["sft", "reward_model", "dpo", "ppo", "evaluate"]


def test_parents_run_once_and_are_links_elsewhere(tmp_path: Path) -> None:
    made = MadeRuns()
    assert sweep(plan_of(*BETAS, seeds=2), tmp_path / "s", made) == []
    once = dict.fromkeys(("base", "pretrain", "sft", "pairs", "reward_model"), 1)
    assert made.counts() == once | dict.fromkeys(("dpo", "ppo", "evaluate"), 6)
    first, last = tmp_path / "s" / "beta-0.05" / "seed-0", tmp_path / "s" / "beta-0.3" / "seed-1"
    assert [path.name for path in sorted(last.iterdir()) if path.is_symlink()] == sorted(once)
    assert (last / "sft").resolve() == (first / "sft").resolve()
    assert not (last / "dpo").is_symlink()
    moved = (tmp_path / "s").rename(tmp_path / "moved")  # the links are relative
    assert (moved / "beta-0.3" / "seed-1" / "sft" / "manifest.json").is_file()


def test_a_killed_sweep_resumes_and_runs_nothing_twice(tmp_path: Path) -> None:
    made, plan = MadeRuns(), plan_of(*BETAS, seeds=2)

    def stop(run: Run, name: str) -> None:
        if (run.point.name, run.seed, name) == ("beta-0.1", 1, "ppo"):
            raise Stopped(15)

    made.fails = stop
    with pytest.raises(Stopped):
        sweep(plan, tmp_path / "s", made)
    made.fails = lambda run, name: None
    with pytest.raises(UserError, match="it has an earlier sweep; add --resume"):
        sweep(plan, tmp_path / "s", made)
    sweep(plan, tmp_path / "s", made, resume=True)
    assert len(made.done) == len(set(made.done)) == 5 + 3 * 6


def test_a_resumed_sweep_may_have_more_values_and_seeds_but_no_other_recipe(tmp_path: Path) -> None:
    made = MadeRuns()
    sweep(plan_of("stages.dpo.beta=0.05,0.1"), tmp_path / "s", made)
    made.done.clear()
    sweep(plan_of(*BETAS, seeds=2), tmp_path / "s", made, resume=True)
    assert made.counts() == {"dpo": 4, "ppo": 4, "evaluate": 4}
    with pytest.raises(UserError, match=r"had another recipe \(stages\.sft\.max_steps: 75 -> 9\)"):
        sweep(plan_of(*BETAS, "stages.sft.max_steps=9"), tmp_path / "s", made, resume=True)


def test_a_link_to_a_removed_folder_is_replaced(tmp_path: Path) -> None:
    """The run that has made the parents is removed, and the sweep continues with the other settings."""
    sweep(plan_of(*BETAS), tmp_path / "s", MadeRuns())
    shutil.rmtree(tmp_path / "s" / "beta-0.05")
    again = MadeRuns()
    sweep(plan_of("stages.dpo.beta=0.1,0.3"), tmp_path / "s", again, resume=True)
    assert again.counts() == dict.fromkeys(("base", "pretrain", "sft", "pairs", "reward_model"), 1)
    first, second = (tmp_path / "s" / f"beta-{beta}" / "seed-0" / "sft" for beta in ("0.1", "0.3"))
    assert not first.is_symlink()
    assert second.resolve() == first.resolve()


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    made = MadeRuns()
    made.status = {"beta-0.1/0": 2}
    failed = sweep(plan_of(*BETAS), tmp_path / "s", made)
    assert failed == [f"{tmp_path / 's' / 'beta-0.1' / 'seed-0'} (exit status 2)"]
    assert made.counts()["dpo"] == 3


def test_an_invalid_value_is_refused_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.dpo\.beta"):
        sweep(plan_of("stages.dpo.beta=0.1,-1"), tmp_path / "s", MadeRuns())
    assert not (tmp_path / "s" / "sweep.json").exists()


def run_of(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose process is a shell script instead of `align run`."""
    (folder / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(interrupt._Request, "number", 0)  # restored after the test
    plan = plan_of(*BETAS)
    return plan.runs(plan.grid()[1], folder)[0]


def test_the_command_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, f'echo "$@" > "{tmp_path}/words"; exit 2', monkeypatch)
    assert runner.start_run(run, tmp_path / "recipe.yaml") == 2
    words = f"-m align.cli run {tmp_path}/recipe.yaml stages.dpo.beta=0.1 --run-dir {tmp_path}/beta-0.1/seed-0 --resume"
    assert (tmp_path / "words").read_text().strip() == words


@pytest.mark.parametrize(("status", "number"), [(130, signal.SIGINT), (143, signal.SIGTERM)])
def test_a_run_that_was_stopped_stops_the_sweep(
    status: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, f"exit {status}", monkeypatch)
    with pytest.raises(Stopped) as stopped:
        runner.start_run(run, tmp_path / "recipe.yaml")
    assert stopped.value.number == number


def test_a_signal_is_passed_on_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run gets the time to write its checkpoint: the sweep ends after it."""
    trap = f'trap "sleep 0.2; touch {tmp_path}/saved; exit 143" TERM; touch {tmp_path}/ready'
    script = f"{trap}; for i in $(seq 250); do sleep 0.02; done"
    run = run_of(tmp_path, script, monkeypatch)

    waits, wait = threading.Event(), subprocess.Popen.wait

    def noted(process: subprocess.Popen, timeout: float | None = None) -> int:
        waits.set()
        return wait(process, timeout)

    def send() -> None:
        waits.wait()  # the process has been started, and its number is known
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "wait", noted)
    with interrupt.listening():
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(Stopped):
            runner.start_run(run, tmp_path / "recipe.yaml")
    assert (tmp_path / "saved").exists()


def test_a_stage_that_is_run_again_leaves_the_shared_result(tmp_path: Path) -> None:
    """`align run --from` in a run of a sweep replaces the link and not what the others use."""
    from align.run.manifest import remove_record

    sweep(plan_of(*BETAS), tmp_path / "s", MadeRuns())
    shared, link = (tmp_path / "s" / f"beta-{beta}" / "seed-0" / "sft" for beta in ("0.05", "0.3"))
    remove_record(link)
    assert not link.exists()
    assert (shared / "manifest.json").is_file()


# --- which setting is best -----------------------------------------------------------------------------------


def test_the_best_setting_has_its_margin_over_seeds(tmp_path: Path) -> None:
    """Differences over three seeds by hand: 0.2, 0.25 and 0.3, whose standard error is 0.05 / sqrt(3)."""
    made = MadeRuns(lambda beta, seed: beta + (0.05 * seed if beta == 0.3 else 0.0))
    sweep(plan_of("stages.dpo.beta=0.1,0.3", seeds=3), tmp_path / "s", made)
    content = sweep_content(tmp_path / "s")
    best, other = content["points"]
    assert (best["label"], content["best"], content["clear"]) == ("stages.dpo.beta=0.3", "beta-0.3", True)
    assert best["metrics"]["dpo/scores"]["mean"] == pytest.approx(0.35 + 0.045)
    (difference,) = content["differences"]
    half = 4.3026527 * 0.05 / math.sqrt(3)  # 0.975 quantile of Student's t with 2 degrees of freedom
    assert [difference[end] for end in ("mean", "low", "high")] == pytest.approx([0.25, 0.25 - half, 0.25 + half])
    assert content["verdict"].startswith("Best in dpo: Reward-model score: stages.dpo.beta=0.3, 0.395.")
    assert "is +0.250 [0.126, 0.374] over 3 seeds" in content["verdict"]
    assert other["runs"][2]["metrics"]["dpo/scores"] == pytest.approx(0.145)


def test_no_setting_is_best_if_the_seeds_disagree(tmp_path: Path) -> None:
    made = MadeRuns(lambda beta, seed: beta * (1 if seed else -1))
    sweep(plan_of(*BETAS, seeds=2), tmp_path / "s", made)
    content = sweep_content(tmp_path / "s")
    assert not content["clear"]
    assert content["verdict"].startswith("No setting is clearly best in dpo: Reward-model score.")
    assert "Not clearly worse:" in content["verdict"]
    assert content["notes"] == ["2 seeds per setting: intervals over so few seeds are wide."]


def test_lower_is_better_with_minimize(tmp_path: Path) -> None:
    """The scores rise with beta, so the lowest beta is best; if the seeds disagree, none is."""
    for name, score, clear in (
        ("agree", lambda beta, seed: beta + 0.01 * seed, True),
        ("disagree", lambda beta, seed: beta * (1 if seed else -1), False),
    ):
        plan, settings = plan_of("stages.dpo.beta=0.1,0.3", seeds=3), Settings("dpo/scores", -1, None)
        run_sweep(plan, tmp_path / name, settings, start=MadeRuns(score), say=lambda line: None)
        content = sweep_content(tmp_path / name)
        (difference,) = content["differences"]
        assert (content["best"], content["clear"]) == ("beta-0.1", clear)
        assert difference["mean"] < 0
        assert clear or "has the lowest mean" in content["verdict"]


def test_the_intervals_widen_with_the_number_of_settings(tmp_path: Path) -> None:
    """With three settings there are two differences, so each interval has the level 97.5 %."""
    made = MadeRuns(lambda beta, seed: beta + (0.05 * seed if beta == 0.3 else 0.0))
    sweep(plan_of(*BETAS, seeds=3), tmp_path / "s", made)
    difference = sweep_content(tmp_path / "s")["differences"][0]
    half = 6.2053468 * 0.05 / math.sqrt(3)  # 0.9875 quantile of Student's t with 2 degrees of freedom
    assert difference["high"] - difference["mean"] == pytest.approx(half)


def test_one_seed_is_judged_by_documents_and_says_so(tmp_path: Path) -> None:
    sweep(plan_of(*BETAS), tmp_path / "s", MadeRuns())
    content = sweep_content(tmp_path / "s")
    assert content["differences"][0]["over"] == "documents"
    assert content["notes"] == [
        "One seed per setting: the intervals are over documents, not over training runs with other seeds."
    ]


def test_the_intervals_over_documents_widen_with_the_number_of_settings(tmp_path: Path) -> None:
    """One seed, three settings, so two differences: 97.5 % each. The differences of the best one are 1 to 10."""
    sweep(plan_of(*BETAS), tmp_path / "s", MadeRuns(lambda beta, seed: 0.0))
    file = tmp_path / "s" / "beta-0.3" / "seed-0" / "evaluate" / "results.json"
    results = json.loads(file.read_text())
    results["models"]["dpo"]["scores"] = [0.01 * n + n + 1 for n in range(10)]
    write_json(file, results)
    content = sweep_content(tmp_path / "s")
    assert content["best"] == "beta-0.3"
    half = 2.6850108 * math.sqrt(55 / 6 / 10)  # 0.9875 quantile of Student's t with 9 degrees of freedom
    for difference in content["differences"]:
        ends = [difference[end] for end in ("mean", "low", "high")]
        assert ends == pytest.approx([5.5, 5.5 - half, 5.5 + half])


def test_one_of_several_seeds_has_no_interval(tmp_path: Path) -> None:
    made = MadeRuns()

    def stop(run: Run, name: str) -> None:
        if (run.point.name, run.seed, name) == ("beta-0.1", 1, "evaluate"):
            raise Stopped(15)

    made.fails = stop
    with pytest.raises(Stopped):
        sweep(plan_of("stages.dpo.beta=0.05,0.1", seeds=2), tmp_path / "s", made)
    content = sweep_content(tmp_path / "s")
    cells = {point["name"]: point["metrics"]["dpo/scores"] for point in content["points"]}
    assert (cells["beta-0.05"]["n"], cells["beta-0.05"]["over"]) == (2, "seeds")
    assert (cells["beta-0.1"]["n"], cells["beta-0.1"]["low"], cells["beta-0.1"]["over"]) == (1, None, None)
    assert "Not finished: stages.dpo.beta=0.1, seed 1." in content["notes"]


def test_the_default_metric_is_of_the_last_affected_model(tmp_path: Path) -> None:
    sweep(plan_of(*BETAS), tmp_path / "s", MadeRuns(), metric=None)
    content = sweep_content(tmp_path / "s")
    assert content["metric"] == "dpo/scores"
    assert list(content["metrics"]) == ["dpo/scores"]  # sft's is equal in all


def test_the_default_metric_among_several_models_and_losses() -> None:
    def value(better: int, documents: bool) -> Value:
        return Value("", better, 0.5, {"a": 0.5} if documents else None)

    measured = {f"{model}/{key}": value(1, True) for model in ("sft", "dpo", "ppo") for key in ("scores", "f1")}
    assert default_metric([{}, measured], ["dpo", "ppo"]) == "ppo/scores"
    assert default_metric([measured], ["dpo"]) == "dpo/scores"
    losses = {"sft/eval_loss": value(-1, False), "dpo/eval_loss": value(-1, False), "dpo/kl": value(0, False)}
    assert default_metric([losses], ["dpo"]) == "dpo/eval_loss"
    assert default_metric([losses], ["ppo"]) is None


def test_a_metric_that_no_run_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--metric dpo/score: .* has no such metric; use one of .*dpo/scores"):
        sweep(plan_of(*BETAS), tmp_path / "s", MadeRuns(), metric="dpo/score")


def test_the_command_prints_the_verdict_and_report_writes_it_again(tmp_path, monkeypatch, capsys) -> None:
    made = MadeRuns()
    monkeypatch.setattr(runner, "start_run", lambda run, recipe, output=None: made(run, recipe))
    cli.main(["sweep", "tiny", *BETAS, "--out", str(tmp_path / "s"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] in (tmp_path / "s" / "report.md").read_text()
    page = (tmp_path / "s" / "report.html").read_text()
    cli.main(["report", str(tmp_path / "s")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "s" / "report.html")
    again = (tmp_path / "s" / "report.html").read_text()
    assert page.split("Generated")[0] == again.split("Generated")[0]
    assert "dpo: Reward-model score, by stages.dpo.beta" in page


def test_a_dry_run_writes_nothing(tmp_path, capsys) -> None:
    cli.main(["sweep", "tiny", *BETAS, "--seeds", "2", "--dry-run", "--out", str(tmp_path / "s")])
    said = capsys.readouterr().out
    assert "sft: 1 time\n" in said
    assert "dpo: 6 times\n" in said
    assert not (tmp_path / "s").exists()


# --- searches ------------------------------------------------------------------------------------------------

RANGE = "stages.dpo.beta=0.01..1:log"


def search_of(plan: Plan, kind: str = "tpe") -> Any:
    pytest.importorskip("optuna", reason="optuna is not installed: pip install 'align-moe[search]'")
    from align.sweep.search import OptunaSearch

    return OptunaSearch(kind, plan.axes, 1, 0)


def search(folder: Path, made: MadeRuns, trials: int, **how: Any) -> None:
    plan = plan_of(RANGE)
    settings = Settings("dpo/scores", 0, ("tpe", trials))
    run_sweep(plan, folder, settings, search=search_of(plan), start=made, say=lambda line: None, **how)


def near(beta: float, seed: int) -> float:
    """A score whose maximum is at beta 0.3."""
    return -abs(math.log(beta / 0.3))


def test_a_search_finds_the_maximum(tmp_path: Path) -> None:
    """Twenty-five draws by TPE come nearer to the maximum than the first ten, which are random."""
    search(tmp_path / "s", MadeRuns(near), 25)
    points = json.loads((tmp_path / "s" / "sweep.json").read_text())["points"]
    values = [near(float(point["settings"]["stages.dpo.beta"]), 0) for point in points]
    assert len(points) == 25
    assert sum(values[10:]) / 15 > sum(values[:10]) / 10 + 0.3
    content = sweep_content(tmp_path / "s")
    assert float(content["points"][0]["settings"]["stages.dpo.beta"]) == pytest.approx(0.3, rel=0.3)


def test_a_search_is_told_means_over_seeds_and_failures(tmp_path: Path) -> None:
    """The second seed of the first point fails before its evaluation."""

    class Listed:
        def __init__(self) -> None:
            self.todo, self.told = ["0.1", "0.3"], []

        def ask(self) -> dict[str, str]:
            return {"stages.dpo.beta": self.todo.pop(0)}

        def tell(self, settings: dict[str, str], value: float | None) -> None:
            self.told.append((settings["stages.dpo.beta"], value))

    made, listed = MadeRuns(lambda beta, seed: beta + seed), Listed()

    def start(run: Run, recipe: Path) -> int:
        return 2 if (run.point.name, run.seed) == ("beta-0.1", 1) else made(run, recipe)

    settings = Settings("dpo/scores", 0, ("random", 2))
    plan = plan_of(RANGE, seeds=2)
    run_sweep(plan, tmp_path / "s", settings, search=listed, start=start, say=lambda line: None)
    # The mean of ten documents is the score plus 0.045; the mean of both seeds of 0.3 is 0.3 + 1/2.
    assert listed.told == [("0.1", None), ("0.3", pytest.approx(0.8 + 0.045))]
    optuna = search_of(plan)
    optuna.tell({"stages.dpo.beta": "0.1"}, None)  # a failed trial has no value
    assert 0.01 <= float(optuna.ask()["stages.dpo.beta"]) <= 1


def test_a_search_with_other_ranges_is_not_continued(tmp_path: Path) -> None:
    search(tmp_path / "s", MadeRuns(near), 2)
    plan = plan_of("stages.dpo.beta=0.01..2:log")
    settings = Settings("dpo/scores", 0, ("tpe", 3))
    with pytest.raises(UserError, match="the earlier search had other ranges; restore them"):
        run_sweep(plan, tmp_path / "s", settings, search=search_of(plan), start=MadeRuns(near), resume=True)


def test_a_killed_search_proposes_what_it_would_have_proposed(tmp_path: Path) -> None:
    made = MadeRuns(near)
    search(tmp_path / "whole", made, 14)
    killed = MadeRuns(near)

    def stop(run: Run, name: str) -> None:
        if len(killed.done) > 40:
            raise Stopped(15)

    killed.fails = stop
    with pytest.raises(Stopped):
        search(tmp_path / "killed", killed, 14)
    killed.fails = lambda run, name: None
    search(tmp_path / "killed", killed, 14, resume=True)
    points = [json.loads((tmp_path / name / "sweep.json").read_text())["points"] for name in ("whole", "killed")]
    assert points[0] == points[1]
    assert len(killed.done) == len(set(killed.done))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([RANGE], "a range of numbers needs --search tpe"),
        ([RANGE, "--search", "tpe", "--metric", "dpo/scores"], "needs a number of trials"),
        ([RANGE, "--search", "tpe", "--trials", "3"], "needs a metric"),
        ([RANGE, "--search", "tpe", "--trials", "3", "--metric", "dpo/kl"], "add --maximize or --minimize"),
        (["--search", "tpe", "--trials", "3", "--metric", "dpo/kl"], "no setting has a range"),
        ([*BETAS, "--trials", "3"], "it needs --search"),
        ([*BETAS, "--seeds", "0"], "must be at least 1"),
        ([*BETAS, "--metric", "dop/scores"], "with one of the models base, pretrain, sft, pairs, reward_model, dpo"),
        ([*BETAS, "--metric", "dpo"], "not of the form MODEL/KEY"),
    ],
)
def test_wrong_searches_are_refused(words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sweep", "tiny", *words])
    assert message in capsys.readouterr().err


def test_a_missing_optuna_is_one_sentence(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit):
        cli.main(["sweep", "tiny", RANGE, "--search", "tpe", "--trials", "3", "--metric", "dpo/scores"])
    said = capsys.readouterr().err
    assert "--search tpe needs the package 'optuna', which is not installed: run `pip install" in said


def test_a_report_of_a_sweep_that_has_only_started(tmp_path: Path) -> None:
    made = MadeRuns()

    def stop(run: Run, name: str) -> None:
        raise Stopped(15)

    made.fails = stop
    with pytest.raises(Stopped):
        sweep(plan_of(*BETAS), tmp_path / "s", made)
    assert len(write_sweep_report(tmp_path / "s")) == 3
    content = sweep_content(tmp_path / "s")
    assert content["verdict"] == "No finished run has a metric to judge the settings by."
    assert len(content["notes"]) == 4
