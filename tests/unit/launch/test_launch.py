"""Starting and ending ranks; rank numbers from hostfiles, Slurm and torchrun; errors before the start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.cli import parse, run_command
from align.config.parallel import Offload, Parallel
from align.errors import Stopped, UserError
from align.launch import processes as launch
from align.parallel.offload import available_memory, require_space


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],login", "gpu07"), ("node3", "node3"), ("a,b", "a"), ("n-1[2,4]", "n-12")],
)
def test_first_host_of_slurms_short_form(nodes: str, first: str) -> None:
    assert launch.first_host(nodes) == first


def test_slurms_variables_become_torchruns() -> None:
    task = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_NNODES": "4",
        "SLURM_JOB_NODELIST": "gpu[3-6]",
        "SLURM_JOB_ID": "123456",
    }
    assert launch.slurm_place(task) == {
        "RANK": "5",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu3",
        "MASTER_PORT": "23456",
    }


def test_a_batch_script_of_slurm_is_not_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch sets SLURM_PROCID and SLURM_NTASKS for the script too; `align run` in the script starts the ranks."""
    for name in launch.PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert not launch.is_rank()


def test_ranks_are_numbered_through_the_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# the cluster\nfirst.test slots=2\n\nsecond.test slots=3  # bigger\n")
    monkeypatch.setattr(launch, "resolve_host", lambda host, where: {"10.0.0." + ("1" if "first" in host else "2")})
    monkeypatch.setattr(socket, "gethostname", lambda: "second.test")
    machines = launch.machines_of(Parallel(processes=5, hostfile=str(hosts)))
    assert machines == ({"first.test": 2, "second.test": 3}, "second.test")
    places = launch.local_places(*machines, "first.test", 29777)
    assert [(place["RANK"], place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"]) for place in places] == [
        ("2", "0", "3"),
        ("3", "1", "3"),
        ("4", "2", "3"),
    ]
    assert {(place["MASTER_ADDR"], place["MASTER_PORT"], place["WORLD_SIZE"]) for place in places} == {
        ("first.test", "29777", "5")
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("one\n", "line 1: 'one' has no slots; write 'one slots=N'"),
        ("one slots=0\n", "line 1: 'slots=0' is not a valid number of processes"),
        ("one slots=1 slots=2\n", "line 1: 'slots=2' is not valid here"),
        ("one slots=9999999999\n", "line 1: 'slots=9999999999' is not a valid number"),
        ("one slots=1\none slots=1\n", "line 2: the machine 'one' is listed twice"),
        ("# none\n", "it lists no machine"),
        ("localhost slots=3\n", "it has 3 slots, but parallel.processes is 2"),
        ("no-such-machine.invalid slots=2\n", "the machine 'no-such-machine.invalid' cannot be resolved"),
    ],
)
def test_a_hostfile_that_does_not_fit_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    with pytest.raises(UserError, match=sentence):
        launch.machines_of(Parallel(processes=2, hostfile=str(hosts)))


@pytest.mark.parametrize(("words", "processes"), [([], 5), (["--nproc", "2"], 2), (["parallel.processes=4"], 4)])
def test_a_hostfile_sets_the_number_of_processes_unless_the_command_does(
    tmp_path, monkeypatch, words, processes
) -> None:
    class Seen(Exception):
        pass

    def load_recipe(name: str, overrides: list[str]) -> None:
        raise Seen(overrides)

    monkeypatch.setattr("align.config.load_recipe", load_recipe)
    (tmp_path / "hosts").write_text("one slots=2\ntwo slots=3\n")
    options = parse(["run", "tiny", "--hostfile", str(tmp_path / "hosts"), *words])
    with pytest.raises(Seen) as seen:
        options.command(options)
    assert [o for o in seen.value.args[0] if o.startswith("parallel.processes")] == [f"parallel.processes={processes}"]


def test_a_machine_is_found_by_name_before_address_and_by_any_of_its_addresses(monkeypatch) -> None:
    """Every address in 127.0.0.0/8 belongs to this machine; 192.0.2.7 belongs to no machine."""
    hosts = {"127.0.0.2": 1, "192.0.2.7": 1, "here.test": 1}
    monkeypatch.setattr(launch, "resolve_host", lambda host, where: {host})
    assert launch.this_machine({"192.0.2.7": 1, "127.0.0.3": 1}, "hosts") == "127.0.0.3"
    monkeypatch.setattr(socket, "gethostname", lambda: "here.test")
    assert launch.this_machine(hosts, "hosts") == "here.test"


def test_the_arguments_of_a_run_are_passed_to_its_ranks() -> None:
    words = ["run", "tiny", "seed=3", "--run-dir", "x", "--only", "sft", "--resume", "--nproc", "2"]
    again = run_command(parse(words), ["seed=3", "parallel.processes=2"])
    assert again == ["run", "tiny", "seed=3", "parallel.processes=2", "--run-dir", "x", "--only", "sft", "--resume"]
    assert parse(again).only == "sft"


def test_offloading_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    free = available_memory()
    assert 2**28 < free < 2**46
    with pytest.raises(UserError, match="GiB are to be offloaded to this machine's memory"):
        require_space(Parallel(offload=Offload(optimizer="cpu")), free, "float32", machines=1)
    require_space(Parallel(offload=Offload(optimizer="cpu")), free // 64, "float32", machines=1)
    require_space(Parallel(offload=Offload(optimizer="cpu")), free, "float32", machines=1, trained=free // 64)
    with pytest.raises(UserError, match="GiB are to be offloaded to this machine's memory"):
        require_space(Parallel(offload=Offload(optimizer="cpu")), 1, "float32", machines=1, trained=free)
    with pytest.raises(UserError, match="the disk of"):
        require_space(Parallel(offload=Offload(parameters="nvme", path=str(tmp_path))), 10**15, "bfloat16", machines=2)
    with pytest.raises(UserError, match="does not exist"):
        require_space(Parallel(offload=Offload(parameters="nvme", path="/no/such")), 1, "bfloat16", machines=1)


def ranks(codes: list[str], monkeypatch: pytest.MonkeyPatch, logs: Path) -> float:
    """Start Python programs as ranks instead of `align`; return the seconds until all have ended."""
    started: list[subprocess.Popen] = []
    real = subprocess.Popen

    def popen(command: list[str], **kwargs):
        started.append(real([sys.executable, "-c", codes[int(kwargs["env"]["RANK"])]], **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    clock = time.monotonic()
    try:
        launch.start(["run"], Parallel(processes=len(codes)), logs)
    finally:
        assert all(process.poll() is not None for process in started), "a rank is still running"
        assert len(started) == len(codes)
    return time.monotonic() - clock


SLEEP = "import time; time.sleep(60)"


def test_a_users_error_on_one_rank_ends_all_ranks_and_is_raised(monkeypatch, tmp_path) -> None:
    fails = "import sys; print('error: rank three is unhappy; cheer it up.', file=sys.stderr); sys.exit(2)"
    clock = time.monotonic()
    with pytest.raises(UserError, match=r"^rank three is unhappy; cheer it up\.$"):
        ranks([SLEEP, SLEEP, SLEEP, fails], monkeypatch, tmp_path)
    assert time.monotonic() - clock < 10


def test_a_killed_rank_is_named(monkeypatch, tmp_path) -> None:
    dies = f"import os; os.kill(os.getpid(), {signal.SIGKILL.value})"
    with pytest.raises(UserError, match=r"rank 1 was ended by SIGKILL .*rank-1\.log.*--resume"):
        ranks([SLEEP, dies], monkeypatch, tmp_path)


def test_a_bug_on_a_rank_shows_its_traceback(monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        ranks([SLEEP, "raise KeyError('lost')"], monkeypatch, tmp_path)
    assert ended.value.code == 1
    assert "KeyError: 'lost'" in capsys.readouterr().err


def test_a_rank_that_ignores_the_request_to_end_is_killed(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.5)
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
    late = "import time, sys; time.sleep(1); sys.exit(2)"
    clock = time.monotonic()
    with pytest.raises(SystemExit):
        ranks([stubborn, late], monkeypatch, tmp_path)
    assert time.monotonic() - clock < 15


SIGNAL_LAUNCHER = f"import os, time; time.sleep(0.5); os.kill(os.getppid(), {signal.SIGTERM.value}); "
SAVES = (
    "import os, signal, sys, time\n"
    "def save(number, frame):\n"
    "    time.sleep(1); open(sys.argv[1] + os.environ['RANK'], 'w').close(); sys.exit(128 + number)\n"
    "signal.signal(signal.SIGTERM, save)\n"
)


def test_a_launcher_forwards_sigterm_and_waits_for_the_ranks_checkpoints(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.1)
    saves = SAVES.replace("sys.argv[1]", repr(f"{tmp_path}/saved-"))
    clock = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        ranks([saves + SLEEP, saves + SIGNAL_LAUNCHER + SLEEP], monkeypatch, tmp_path)
    assert stopped.value.number == signal.SIGTERM
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert time.monotonic() - clock < 15


def test_ranks_that_ignore_a_request_to_stop_are_killed_in_the_end(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.1)
    monkeypatch.setattr(launch, "STOP", 1.0)
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SIGNAL_LAUNCHER}{SLEEP}"
    with pytest.raises(Stopped):
        ranks([SLEEP, stubborn], monkeypatch, tmp_path)


def test_a_run_that_finishes_despite_a_request_to_stop_succeeds(monkeypatch, tmp_path) -> None:
    finishes = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SIGNAL_LAUNCHER}time.sleep(1)"
    ranks([finishes], monkeypatch, tmp_path)


def test_a_rank_that_fails_during_a_stop_is_reported(monkeypatch, tmp_path) -> None:
    fails = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: the disk is full.')); "
    with pytest.raises(SystemExit) as ended:
        ranks([fails + SIGNAL_LAUNCHER + SLEEP], monkeypatch, tmp_path)
    assert ended.value.code == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_cannot_connect_to_the_others_reports_it(number: int, monkeypatch) -> None:
    from align.launch import machines
    from align.parallel import group as processes

    place = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.free_port())}
    for key, value in place.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(machines, "MEETING", 1.0)
    sentence = rf"^rank {number} could not connect to the other ranks at 127\.0\.0\.1:\d+ \(.*\); start every machine"
    with pytest.raises(UserError, match=sentence):
        processes.connect({})


def test_ranks_that_finish_are_waited_for(monkeypatch, tmp_path) -> None:
    ranks(["import os; assert os.environ['WORLD_SIZE'] == '2'"] * 2, monkeypatch, tmp_path)


def test_a_process_that_torchrun_started_is_a_rank(monkeypatch) -> None:
    for key in [key for key in os.environ if key.startswith("SLURM") or key in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(key)
    assert not launch.is_rank()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.is_rank()


def test_the_lock_file_of_a_killed_rank_blocks_no_run(tmp_path: Path) -> None:
    """torch loads DeepSpeed's shared-memory collectives under a lock file and waits for that file forever."""
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "lock").touch()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(launch.free_port()), "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    script = "from align.launch.ending import end_process as e; from align.parallel.group import start_deepspeed as s; "
    script += "s('gloo'); e(0)"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **place}, timeout=120, check=True)


TRAPPED = """
import atexit, ctypes, sys
from align import cli
from align.cli import runs
from align.launch import ending

# The interpreter's shutdown calls abort(), as torch's threads sometimes do.
ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).abort)
atexit.register(print, "closed")
if sys.argv.pop(1) == "rank":
    ending.mark_joined()
runs._check = lambda options: 1 / 0
cli.main()
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["show", "tiny"], 0, "name: tiny"),
        (["show", "nowhere"], 2, "error: "),
        (["check", "tiny"], 1, "ZeroDivisionError: "),
    ],
)
def test_a_rank_skips_interpreter_shutdown(words: list[str], code: int, said: str) -> None:
    def run(role: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", TRAPPED, role, *words], capture_output=True, text=True)

    rank = run("rank")
    assert rank.returncode == code, rank.stderr
    assert said in rank.stdout + rank.stderr
    assert "closed" in rank.stdout
    assert run("single").returncode == -signal.SIGABRT
