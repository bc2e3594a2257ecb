"""Two ranks under every launcher give the metrics and weights of `align run --nproc 2`."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from align.launch.processes import free_port
from tests.integration import forked
from tests.integration.kills import Launcher
from tests.integration.runs import ROOT, exported, metrics, plain_environment, run, write_pretraining

BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_pretraining(folder, folder, steps=2)
    return folder / "recipe.yaml"


def start(command: list[str]) -> subprocess.Popen:
    """Start `command` without the environment variables that make a process a rank."""
    return subprocess.Popen(
        command,
        env=plain_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*processes: Launcher) -> list[str]:
    """Wait for all processes, which must exit with 0; return their outputs. If one fails, kill the others."""
    deadline = time.monotonic() + 400
    try:
        while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-4000:]
    return outputs


def result(run_dir: Path) -> tuple[list[dict], dict[str, bytes]]:
    """Metrics and weights of the pretraining stage."""
    return metrics(run_dir, "pretrain"), exported(run_dir, "pretrain")


@pytest.fixture(scope="module")
def ours(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ours") / "run"
    run(recipe, run_dir, "--nproc", "2", forks=True)
    lines, weights = result(run_dir)
    assert [line["step"] for line in lines] == [1, 2]
    assert weights
    return run_dir


@pytest.fixture
def run_dir(ours: Path, tmp_path: Path) -> Path:
    """A new run folder with a copy of the finished base model."""
    shutil.copytree(ours / "base", tmp_path / "run" / "base")
    return tmp_path / "run"


@pytest.fixture
def words(recipe: Path, run_dir: Path) -> list[str]:
    """Arguments of `align` or `-m align.cli`."""
    return ["run", str(recipe), "--run-dir", str(run_dir)]


def require_same(run_dir: Path, ours: Path, outputs: list[str]) -> None:
    assert result(run_dir) == result(ours)
    assert sum(output.count("pretrain: done") for output in outputs) == 1, "only rank 0 prints"
    # If the launcher had started a single process, that process would have started ranks with log files.
    assert not (run_dir / "logs").exists()


def test_torchrun(ours: Path, run_dir: Path, words: list[str]) -> None:
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    require_same(run_dir, ours, finish(start([*command, "-m", "align.cli", *words])))


def test_accelerate_launch(ours: Path, run_dir: Path, words: list[str]) -> None:
    """`--multi_gpu`, the default on a machine with several GPUs, makes accelerate start ranks on a CPU too."""
    command = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", str(free_port())]
    require_same(run_dir, ours, finish(start([*command, "-m", "align.cli", *words])))


def test_slurm(ours: Path, run_dir: Path, words: list[str]) -> None:
    """Two processes with the variables that `srun --ntasks 2` sets are two ranks."""
    job = {
        "SLURM_JOB_ID": free_job(),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        forked.align(words, {**plain_environment(), **job, "SLURM_PROCID": task, "SLURM_LOCALID": task}, ROOT)
        for task in ("0", "1")
    ]
    require_same(run_dir, ours, finish(*tasks))


def free_job() -> str:
    """A Slurm job number whose port (20,000 + job) is free."""
    while True:
        job = random.SystemRandom().randrange(10_000)
        with suppress(OSError), socket.create_server(("", 20_000 + job)):
            return str(job)


def test_hostfile(ours: Path, run_dir: Path, words: list[str], tmp_path: Path) -> None:
    """Two machines with one rank each give the same result; both are this machine, under two names."""
    names = ("127.0.0.2", "127.0.0.3")
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    environment = plain_environment() | {"MASTER_PORT": str(free_port())}
    hosts = ["--hostfile", str(tmp_path / "hosts")]
    machines = [
        forked.align([*words, *hosts], environment, ROOT, changes={"socket.gethostname": partial(str, name)})
        for name in names
    ]
    outputs = finish(*machines)
    assert result(run_dir) == result(ours)
    assert [output.count("pretrain: done") for output in outputs] == [1, 0]
    assert sorted(log.name for log in (run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
