"""Every program and recipe in examples/ runs, on models small enough for a test."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from align.cli import main, parse
from align.config import load_recipe
from align.config.recipe import Recipe
from align.pipeline import run
from align.preflight import problems
from align.run.folder import read_jsonl
from tests.integration.runs import ROOT, small_model

EXAMPLES = ROOT / "examples"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
PAIRS = [{"prompt": f"Say {word}.", "chosen": f"It is {word}.", "rejected": "No." * (i % 3 + 1)}
         for i, word in enumerate(WORDS)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs.jsonl and a finished DPO run of three steps, each on all pairs."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    text = [{"kind": "file", "path": str(folder / "pairs.jsonl"), "columns": {"text": "chosen"}}]
    dpo = {
        "kind": "dpo",
        "data": {"train": [{"kind": "file", "path": str(folder / "pairs.jsonl")}], "max_length": 64},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "beta": 0.3,
        "batch_size": len(PAIRS),
        "micro_batch_size": len(PAIRS),
        "max_steps": 3,
    }
    model = small_model(text, initializer_range=0.1, router_aux_loss_coef=0.02, moe_topk=1)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "pairs", "model": model, "stages": {"dpo": dpo}}))
    run(load_recipe(folder / "recipe.yaml"), folder / "run", say=lambda line: None)
    return folder


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a program of examples/ with some arguments and returns what it prints."""

    def run_example(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_dpo_prints_the_losses_of_the_stage(folder: Path, output) -> None:
    printed = output(
        "dpo_in_one_page.py", folder / "run/base/model", folder / "pairs.jsonl",
        "--beta", 0.3, "--learning-rate", 1e-3, "--batch-size", len(PAIRS), "--steps", 3,
    )  # fmt: skip
    losses = [float(value) for value in re.findall(r"loss (\S+)", printed)]
    stage = [line["loss"] for line in read_jsonl(folder / "run/dpo/metrics.jsonl") if "loss" in line]
    assert losses == pytest.approx(stage, rel=2e-5)
    assert len(set(losses)) == 3


def test_grpo_raises_its_score(folder: Path, output) -> None:
    arguments = ("--steps", 5, "--batch-size", 2, "--max-new-tokens", 24, "--learning-rate", 1e-2)
    printed = output("grpo_in_one_page.py", folder / "run/base/model", folder / "pairs.jsonl", *arguments)
    scores = [float(value) for value in re.findall(r"score (\S+)", printed)]
    assert len(scores) == 5
    assert max(scores[2:]) > scores[0]


def test_a_checkpoint_generates_in_plain_transformers(folder: Path, output) -> None:
    printed = output("use_elsewhere.py", folder / "run/dpo/model", "Say one.", "--max-new-tokens", 4)
    assert printed.startswith("HunYuanForCausalLM (align.models.hunyuan.modeling): ")


def test_any_checkpoint_is_evaluated(folder: Path, tmp_path: Path, output) -> None:
    """The models have at most three training steps, so every answer is wrong; the reference itself would score 1."""
    checkpoints = folder / "run/base", folder / "run/dpo/model"
    printed = output(
        "evaluate_any_checkpoint.py", *checkpoints, "--prompts", folder / "pairs.jsonl", "--metric", "exact",
        "--max-new-tokens", 4, "--run-dir", tmp_path / "run",
    )  # fmt: skip
    lines = printed.splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == [str(path) for path in checkpoints]
    upper = 1.96**2 / (len(PAIRS) + 1.96**2)  # Wilson's interval of no success
    assert all(f"exact 0.000 [0.000, {upper:.3f}]  n {len(PAIRS)}" in line for line in lines[:2])
    assert (tmp_path / "run" / "report.html").is_file()


def test_your_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    changes = ["stages.sft.epochs=1", "stages.dpo.max_steps=1", "model.config.num_hidden_layers=2"]
    recipe = load_recipe(EXAMPLES / "your_own_data" / "recipe.yaml", changes)
    run(recipe, tmp_path / "run", say=lambda line: None)
    counts = {
        stage: json.loads((tmp_path / "run" / stage / "manifest.json").read_text())["data"] for stage in ("sft", "dpo")
    }
    assert {stage: (data["rows_read"], data["dropped"]) for stage, data in counts.items()} == {
        "sft": (20, {}),
        "dpo": (20, {}),
    }
    assert counts["dpo"]["rows_held_out"] > 0


def test_your_own_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of its README, on a smaller model, give a model that has learned the answers."""
    here = EXAMPLES / "your_own_adapter"
    content = yaml.safe_load((here / "recipe.yaml").read_text(encoding="utf-8"))
    tokenizer = [{"kind": "file", "path": "examples/your_own_adapter/chats.jsonl"}]
    content["model"] = small_model(tokenizer, initializer_range=0.1, num_experts=1)
    content["stages"]["sft"] |= {"epochs": 60, "optimizer": {"learning_rate": 3e-2}}
    content["stages"]["sft"]["lora"] |= {"rank": 16, "targets": ["attention", "shared_expert", "embeddings"]}
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^ {4}align (.+)$", (here / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [command.split()[0] for command in commands if "shop" not in command] == [
        "check",
        "run",
        "adapter",
        "adapter",
        "chat",
        "adapter",
    ]
    questions = iter(["When do you open?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    printed = {}
    for command in commands:
        if "shop" in command:  # the two that serve need vLLM; tests/unit/serve has them
            parse(shlex.split(command))
            continue
        main(shlex.split(command.replace("examples/your_own_adapter/recipe.yaml", "recipe.yaml")))
        printed[" ".join(command.split()[:2])] = capsys.readouterr().out
    assert "sft: policy trains attention " in printed["check examples/your_own_adapter/recipe.yaml"]
    assert "attention " in printed["run examples/your_own_adapter/recipe.yaml"]
    assert "align serve: it trains in full: embeddings" in printed["adapter info"]
    assert "We open at 8 every day." in printed["chat runs/your_own_adapter/sft"]
    sizes = [sum(file.stat().st_size for file in (tmp_path / "runs/your_own_adapter" / name).glob("*.safetensors"))
             for name in ("sft/model", "merged")]  # fmt: skip
    assert sizes[0] > 0
    assert sizes[1] > 0
    base = load_recipe(here / "recipe.yaml").stages["sft"].lora
    assert base is not None
    assert base.targets == ["attention", "shared_expert"]  # which vLLM serves


def test_your_own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = [sys.executable, str(EXAMPLES / "your_own_reward" / "server.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            changes = [
                "stages.grpo.steps=1", "stages.grpo.batch_size=8", "stages.grpo.mini_batch_size=8",
                "stages.grpo.rollout.engine=huggingface",
            ]  # fmt: skip
            text = (EXAMPLES / "your_own_reward" / "recipe.yaml").read_text(encoding="utf-8")
            assert "http://127.0.0.1:8123" in text
            (tmp_path / "recipe.yaml").write_text(text.replace("http://127.0.0.1:8123", url), encoding="utf-8")
            run(load_recipe(tmp_path / "recipe.yaml", changes), tmp_path / "run", say=lambda line: None)
        finally:
            server.terminate()
    metrics = read_jsonl(tmp_path / "run" / "grpo" / "metrics.jsonl")[0]
    assert 0 < metrics["reward/vowels"] < 1
    assert 0 <= metrics["reward/lower_case"] <= 1
    assert metrics["score_mean"] == pytest.approx(metrics["reward/vowels"] + 0.5 * metrics["reward/lower_case"])


CLUSTER = EXAMPLES / "cluster"


def commands(text: str, command: str) -> list[list[str]]:
    """The arguments of each `align COMMAND` line, in a page's blocks or a script's comments."""
    lines = re.findall(rf"^[# ]+(align {command} .*)$", text, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def test_the_cluster_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's `align plan` and `align check` commands run, its figures are those that the plans print, and the
    `align plan` command in each file is also on the page."""
    monkeypatch.chdir(ROOT)
    page = (CLUSTER / "README.md").read_text(encoding="utf-8")
    plans, checks = commands(page, "plan"), commands(page, "check")
    assert [len(plans), len(checks)] == [2, 2]
    for command in (*plans, *checks):
        main(command)
    printed = capsys.readouterr().out
    assert "does not fit" not in printed
    assert "hunyuan-large: ok" in printed
    assert "two_hosts.yaml: ok" in printed
    assert "116 of 141 GB per GPU, 1,749 of 2,000 GB per host" in printed
    assert "116 of 141 GB per GPU and 1,749 of 2,000 GB per host" in page
    assert "15.2 of 80.0 GB per GPU" in printed
    assert "15.2 of 80.0 GB per GPU" in page
    for name in ("hunyuan-large.sbatch", "torchrun.sh", "kubernetes.yaml", "two_hosts.yaml"):
        (plan,) = commands((CLUSTER / name).read_text(encoding="utf-8"), "plan")
        assert plan in plans, name


@pytest.fixture
def started(tmp_path: Path):
    """Runs a script of examples/cluster with stand-ins for the programs that it starts; returns their command lines."""
    for name in ("align", "srun", "torchrun"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n")
        program.chmod(0o755)

    def start(command: list[str], **variables: str) -> list[list[str]]:
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **variables}
        subprocess.run(command, env=environment, check=True, cwd=ROOT)
        return [line.rstrip("\0").split("\0") for line in (tmp_path / "calls").read_text().splitlines()]

    return start


def recipe_of(run: list[str]) -> Recipe:
    """The recipe that the arguments of `align run` start, with its overrides."""
    options = parse(run)
    assert options.resume
    return load_recipe(options.recipe, options.overrides)


def require_checked_before(check: list[str], run: list[str]) -> None:
    """Require that `check` is `align check` with the recipe and overrides of `run`."""
    assert check == ["align", "check", *(word for word in run[1:] if word != "--resume")]


def test_slurm_starts_the_recipes_ranks(started, tmp_path: Path) -> None:
    script = CLUSTER / "hunyuan-large.sbatch"
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(encoding="utf-8"), re.MULTILINE))
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    place = {"SLURM_NTASKS": str(tasks), "SLURM_CPUS_PER_TASK": options["cpus-per-task"]}
    check, step = started(["bash", str(script)], SLURM_SUBMIT_DIR=str(tmp_path), **place)
    run = step[step.index("align") + 1 :]
    require_checked_before(check, run)
    recipe = recipe_of(run)
    assert recipe.parallel is not None
    assert recipe.parallel.processes == tasks == 64
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert step[1 : step.index("align")] == ["--kill-on-bad-exit", "--gpu-bind=none", "--cpus-per-task=12"]
    hosts = (CLUSTER / "hosts").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in hosts] == [f"slots={options['ntasks-per-node']}"] * int(options["nodes"])


def require_torchrun(arguments: list[str], machines: int, machine: str) -> None:
    """Require that torchrun itself parses the arguments, and that they start as many ranks as the recipe has."""
    options = get_args_parser().parse_args(arguments)
    assert (options.nnodes, options.nproc_per_node, options.node_rank) == (str(machines), "8", int(machine))
    assert options.shutdown_timeout >= 600  # the seconds that align gives ranks for a checkpoint
    assert (options.module, options.training_script) == (True, "align.cli")
    recipe = recipe_of(options.training_script_args)
    assert recipe.parallel is not None
    assert recipe.parallel.processes == 8 * machines
    assert problems(recipe, list(recipe.stages), files=False) == []


def test_torchrun_starts_the_recipes_ranks_on_two_machines(started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = [str(CLUSTER / "torchrun.sh"), "examples/cluster/two_hosts.yaml"]
    check, run = started(command, MACHINES="2", RANK_OF_MACHINE="1", FIRST_MACHINE="gpu-01")
    require_torchrun(run[1:], 2, "1")
    require_checked_before(check, run[run.index("align.cli") + 1 :])
    assert run[run.index("--master-addr") + 1] == "gpu-01"


def test_kubernetes_starts_the_recipes_ranks_in_two_pods(started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CLUSTER)  # the volume holds two_hosts.yaml
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    name, pods = service["metadata"]["name"], job["spec"]["completions"]
    assert service["spec"] == {
        "clusterIP": "None",  # headless: each pod has an address of its own
        "publishNotReadyAddresses": True,
        "selector": {"job-name": job["metadata"]["name"]},
    }
    assert (job["spec"]["parallelism"], job["spec"]["completionMode"]) == (pods, "Indexed")
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == name
    assert pod["terminationGracePeriodSeconds"] > 600
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert mounted[container["workingDir"]] in volumes
    check, run = started([*container["command"], *container["args"]], JOB_COMPLETION_INDEX="1")
    require_torchrun(run[1:], pods, "1")
    require_checked_before(check, run[run.index("align.cli") + 1 :])
    # An indexed Job calls its pods NAME-INDEX; the Service's name is their domain.
    assert run[run.index("--master-addr") + 1] == f"{job['metadata']['name']}-0.{name}"


def test_the_server_has_forty_lines() -> None:
    assert len((EXAMPLES / "your_own_reward" / "server.py").read_text(encoding="utf-8").splitlines()) <= 40


def test_the_table_names_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")} <= set(
        re.findall(r"\]\(([^)/]+)/?\)", table)
    )
