"""Two ranks by every way in which they can be started: what `align run --nproc 2` makes, each time."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from align.distributed.launch import PLACE, free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS = [f"{n} and {n + 1} make {2 * n + 1}." for n in range(60)]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of pretraining, with experts and everything else over two ranks."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    texts = [{"kind": "file", "path": str(folder / "texts.jsonl")}]
    pretrain = {"kind": "pretrain", "data": {"train": texts, "max_length": 32}, "max_steps": 2}
    content = {
        "name": "launched",
        "parallel": {"processes": 2, "expert_parallel_size": 2},
        "model": {"kind": "scratch", "tokenizer": {"vocab_size": 300, "data": texts}, "config": SIZES},
        "stages": {"pretrain": {**pretrain, "batch_size": 8, "micro_batch_size": 2}},
    }
    (folder / "launched.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "launched.yaml"


def start(command: list[str], **variables: str) -> subprocess.Popen:
    """In an environment where nothing says yet that this is a rank."""
    plain = {k: v for k, v in os.environ.items() if k not in PLACE and not k.startswith(("SLURM_", "ACCELERATE_"))}
    plain |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        command,
        env={**plain, **variables},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*processes: subprocess.Popen) -> list[str]:
    """What each printed; all must have ended well. When one has not, nobody waits for the others."""
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


def result(run_dir: Path) -> tuple[list[dict], bytes]:
    """The lines of the metrics, and the weights."""
    lines = [json.loads(line) for line in (run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    files = sorted((run_dir / "pretrain" / "model").glob("*.safetensors"))
    return lines, b"".join(file.read_bytes() for file in files)


@pytest.fixture(scope="module")
def ours(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ours") / "run"
    finish(start([sys.executable, "-m", "align.cli", "run", str(recipe), "--run-dir", str(run_dir), "--nproc", "2"]))
    lines, weights = result(run_dir)
    assert [line["step"] for line in lines] == [1, 2]
    assert weights
    return run_dir


@pytest.fixture
def run_dir(ours: Path, tmp_path: Path) -> Path:
    """A folder of its own, with the base model that is there already."""
    shutil.copytree(ours / "base", tmp_path / "run" / "base")
    return tmp_path / "run"


@pytest.fixture
def words(recipe: Path, run_dir: Path) -> list[str]:
    """What stands behind `align`, or behind `-m align.cli`."""
    return ["run", str(recipe), "--run-dir", str(run_dir)]


def require_same(run_dir: Path, ours: Path, outputs: list[str]) -> None:
    assert result(run_dir) == result(ours)
    assert sum(output.count("pretrain: done") for output in outputs) == 1, "only rank 0 prints"
    # A launcher that started one process would have had it start the ranks, with logs of their own.
    assert not (run_dir / "logs").exists()


def test_torchrun(ours: Path, run_dir: Path, words: list[str]) -> None:
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    require_same(run_dir, ours, finish(start([*command, "-m", "align.cli", *words])))


def test_accelerate_launch(ours: Path, run_dir: Path, words: list[str]) -> None:
    """--multi_gpu, which it takes for granted where it sees several, has it start ranks on a CPU as well."""
    command = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", str(free_port())]
    require_same(run_dir, ours, finish(start([*command, "-m", "align.cli", *words])))


def test_slurm(ours: Path, run_dir: Path, words: list[str]) -> None:
    """The variables that `srun --ntasks 2` gives to its tasks."""
    job = {
        "SLURM_JOB_ID": free_job(),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        start([sys.executable, "-m", "align.cli", *words], **job, SLURM_PROCID=task, SLURM_LOCALID=task)
        for task in ("0", "1")
    ]
    require_same(run_dir, ours, finish(*tasks))


def free_job() -> str:
    """The number of a job whose port nobody has."""
    while True:
        job = random.SystemRandom().randrange(10_000)
        with suppress(OSError), socket.create_server(("", 20_000 + job)):
            return str(job)


NAMED = (
    "import socket, sys; name = sys.argv.pop(1); socket.gethostname = lambda: name; import align.cli; align.cli.main()"
)
"""`align` on a machine that goes by another name: the loopback network has room for a whole cluster."""


def test_hostfile(ours: Path, run_dir: Path, words: list[str], tmp_path: Path) -> None:
    """`align run` on two machines of one rank each, which are this one under two names."""
    names = ("127.0.0.2", "127.0.0.3")
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    port = str(free_port())
    machines = [
        start(
            [sys.executable, "-c", NAMED, name, *words, "--hostfile", str(tmp_path / "hosts")],
            MASTER_PORT=port,
        )
        for name in names
    ]
    outputs = finish(*machines)
    assert result(run_dir) == result(ours)
    assert [output.count("pretrain: done") for output in outputs] == [1, 0]
    assert sorted(log.name for log in (run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
