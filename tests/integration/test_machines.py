"""Training on two machines, and failures of one. Linux network namespaces stand for the machines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from align.launch.machines import SILENCE
from tests.integration import forked
from tests.integration.forked import Forked
from tests.integration.kills import Launcher
from tests.integration.runs import metrics, plain_environment, write_pretraining

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
ADDRESSES = {"a": "10.177.0.1", "b": "10.177.0.2"}
HOSTS = ("--hostfile", "hosts")


class Network:
    """Two network namespaces with a link between them, and a hostfile with their addresses."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, list[subprocess.Popen]()
        self.forked: list[Forked] = []
        mark = f"align{os.getpid()}"
        self.names = {machine: f"{mark}{machine}" for machine in ADDRESSES}
        (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))

    def plug(self) -> None:
        for name in self.names.values():
            ip("netns", "add", name)
        one, other = self.names.values()
        ip("link", "add", "net0", "netns", one, "type", "veth", "peer", "name", "net0", "netns", other)
        for machine, name in self.names.items():
            ip("-n", name, "address", "add", f"{ADDRESSES[machine]}/24", "dev", "net0")
            ip("-n", name, "link", "set", "net0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def unplug(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for launcher in self.forked:
            launcher.kill()
        for name in self.names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def disconnect(self) -> None:
        """Take the link down; no connection is closed."""
        ip("-n", self.names["b"], "link", "set", "net0", "down")

    def start(self, machine: str, *command: str) -> subprocess.Popen:
        self.started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", self.names[machine], *command],
                env=plain_environment(),
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return self.started[-1]

    def align(self, machine: str, run_dir: str, *words: str) -> subprocess.Popen:
        """Start `align run recipe.yaml`."""
        run = ["run", "recipe.yaml", "--run-dir", run_dir, *words]
        return self.start(machine, sys.executable, "-m", "align.cli", *run)

    def fork(self, machine: str, run_dir: str, *words: str, silence: float = SILENCE) -> Forked:
        """`align`, with processes that do not load the libraries again."""
        words = ("run", "recipe.yaml", "--run-dir", run_dir, *words)
        how: dict[str, Any] = {"network": self.names[machine], "changes": {"align.launch.machines.SILENCE": silence}}
        self.forked.append(forked.align([*words], plain_environment(), self.folder, **how))
        return self.forked[-1]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2, which is not installed")
    network = Network(tmp_path_factory.mktemp("network"))
    try:
        try:
            network.plug()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces, which cannot be created here: {error.stderr}")
        write_pretraining(network.folder, Path(), steps=3)
        yield network
    finally:
        network.unplug()


def outputs(processes: Sequence[Launcher], limit: float = 300) -> list[str]:
    return [process.communicate(timeout=limit)[0] for process in processes]


def until(condition: Callable[[], bool], processes: Sequence[Launcher]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), outputs(processes)
        time.sleep(0.05)


def test_two_machines_train_as_two_processes_of_one(network: Network) -> None:
    machines = [network.align(machine, "run", *HOSTS) for machine in ("b", "a")]
    said = outputs(machines)
    assert [process.returncode for process in machines] == [0, 0], said
    assert [output.count("pretrain: done") for output in said] == [0, 1]
    one = network.fork("a", "one")
    (text,) = outputs([one])
    assert one.returncode == 0, text
    assert metrics(network.folder / "run", "pretrain") == metrics(network.folder / "one", "pretrain")
    for file in (network.folder / "one/pretrain/model").iterdir():
        assert (network.folder / "run/pretrain/model" / file.name).read_bytes() == file.read_bytes(), file.name


LONG = ("stages.pretrain.max_steps=5000",)


@pytest.fixture
def training(network: Network, request: pytest.FixtureRequest) -> tuple[list[Forked], str]:
    """The launchers of both machines in the middle of a stage, and the name of the run folder."""
    name, silence = request.node.originalname, getattr(request, "param", SILENCE)
    machines = [network.fork(machine, name, *HOSTS, *LONG, silence=silence) for machine in ("a", "b")]
    until(lambda: len(metrics(network.folder / name, "pretrain")) > 2, machines)
    return machines, name


def test_a_killed_rank_ends_both_machines_with_an_error_that_names_it(network: Network, training) -> None:
    machines, name = training
    (rank,) = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text().split()
    os.kill(int(rank), signal.SIGKILL)
    clock = time.monotonic()
    said = outputs(machines, 30)
    assert time.monotonic() - clock < 15
    sentence = f"rank 1 on {ADDRESSES['b']} was ended by SIGKILL (see {name}/logs/rank-1.log); continue with --resume."
    for process, output in zip(machines, said, strict=True):
        assert process.returncode == 2
        assert output.splitlines()[-1] == f"error: {sentence}"
        assert "Traceback" not in output


@pytest.mark.parametrize("training", [10.0], indirect=True)
def test_both_machines_end_when_the_link_is_down(network: Network, training) -> None:
    machines, _ = training
    network.disconnect()
    clock = time.monotonic()
    try:
        said = outputs(machines, 120)
    finally:
        ip("-n", network.names["b"], "link", "set", "net0", "up")
    assert 8 < time.monotonic() - clock < 30
    for process, output, other in zip(machines, said, ("b", "a"), strict=True):
        assert process.returncode == 2
        assert f"error: {ADDRESSES[other]} has not responded for 10 seconds" in output.splitlines()[-1]


def test_machines_with_different_recipes_are_refused(network: Network) -> None:
    machines = [network.fork("a", "differs", *HOSTS), network.fork("b", "differs", *HOSTS, "seed=3")]
    for process, output in zip(machines, outputs(machines, 120), strict=True):
        assert process.returncode == 2
        assert output.splitlines()[-1].startswith("error: rank 1 differs from rank 0 in the recipe")
    assert not (network.folder / "differs" / "base").exists()


def test_a_port_in_use_is_reported_on_both_machines(network: Network) -> None:
    """Machine a cannot listen on the port and ends at once; machine b connects to the program that uses the port."""
    listener = "import socket; s = socket.create_server(('', 29500)); print('ready', flush=True)"
    listener += "\nfor _ in range(9): c = s.accept()[0]; c.recv(9); c.sendall(b'no'); c.close()"
    holder = network.start("a", sys.executable, "-c", listener)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    machines = [network.align(machine, "port", *HOSTS) for machine in ("a", "b")]
    first, second = outputs(machines, 60)
    assert first.startswith("error: port 29500 cannot be used on this machine (Address already in use)")
    place = f"{ADDRESSES['a']}:29500"
    assert second.splitlines()[-1].startswith(f"error: {place} is in use by a program other than `align run`")
    assert [process.returncode for process in machines] == [2, 2]
