"""`align doctor` on simulated machines: a stand-in for `nvidia-smi` prints what the real program would print there.

Formats: https://docs.nvidia.com/deploy/nvidia-smi (queries as CSV, `topo -m` as a matrix with tabs and an underlined
header).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from align import cli, doctor
from align.doctor import TorchBuild, cautions, gpu_report, problems, verdict
from align.launch.nvidia import Gpu, NvidiaMachine, count_pci_gpus, describe_links, read_machine

BANNER = """Sun Nov 29 09:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver}             Driver Version: {driver}     CUDA Version: {cuda}     |
|-----------------------------------------+------------------------+----------------------+
"""
LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""
H200 = "NVIDIA H200, 143771, 9.0"
CUDA_13 = TorchBuild("2.14.0+cu130", "13.0", 8, ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"), "2.28.9")
CPU = TorchBuild("2.13.0+cpu")


def topology(kinds: list[list[str]], nics: int = 2) -> str:
    """Output of `nvidia-smi topo -m` for GPUs with the links `kinds`, each also connected to the RDMA devices."""
    names = [f"GPU{i}" for i in range(len(kinds))] + [f"NIC{i}" for i in range(nics)]
    header = "\t".join(["", *names, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])
    rows = [f"\x1b[4m{header}\x1b[0m"]
    for i, row in enumerate(kinds):
        rows.append("\t".join([f"GPU{i}", *(" X " if i == j else kind for j, kind in enumerate(row)), *["SYS"] * nics,
                               "0-47,96-143", "0", "", "N/A"]))  # fmt: skip
    for i in range(nics):
        rows.append("\t".join([f"NIC{i}", *["SYS"] * len(kinds), *(" X " if i == j else "PIX" for j in range(nics))]))
    return "\n".join(rows) + "\n" + (LEGEND if nics else LEGEND.partition("NIC Legend")[0])


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a stand-in for `nvidia-smi` on PATH that handles the doctor's three calls, or fails with a message on
    stdout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(gpus: list[str], driver: str, cuda: str, matrix: str = "", fails: str = "") -> None:
        table = "".join(f"{i}, {gpu}, {driver}\n" for i, gpu in enumerate(gpus))
        for name, text in (("table", table), ("banner", BANNER.format(driver=driver, cuda=cuda)), ("matrix", matrix)):
            (folder / name).write_text(text)
        (folder / "nvidia-smi").write_text(
            f"#!/bin/sh\ncd {folder}\n"
            + (f"echo '{fails}'; exit 9\n" if fails else "")
            + 'case "$*" in\n'
            + '  "") cat banner ;;\n'
            + '  "topo -m") cat matrix ;;\n'
            + '  "--query-gpu=index,name,memory.total,compute_cap,driver_version --format=csv,noheader,nounits")\n'
            + "    cat table ;;\n"
            + '  *) echo "Invalid combination of input arguments."; exit 2 ;;\n'
            + "esac\n"
        )
        (folder / "nvidia-smi").chmod(0o755)

    return write


def test_eight_gpus_with_nvlink(nvidia_smi) -> None:
    nvidia_smi([H200] * 8, "580.95.05", "13.0", topology([["NV18"] * 8] * 8))
    machine = read_machine()
    assert machine.gpus == tuple(Gpu(i, "NVIDIA H200", 143771, (9, 0)) for i in range(8))
    assert (machine.driver, machine.cuda, machine.error) == ("580.95.05", "13.0", None)
    assert machine.links == {(i, j): "NV18" for i in range(8) for j in range(i + 1, 8)}
    assert gpu_report(machine, CUDA_13) == {
        "driver": "580.95.05, supports CUDA 13.0",
        "cuda": "torch 2.14.0+cu130 is built for CUDA 13.0, with NCCL 2.28.9",
        "gpus": "GPU 0-7: NVIDIA H200, 140 GiB, compute capability 9.0",
        "links": "NVLink (NV18) between all GPUs",
        "network": "mlx5_0, mlx5_1",
    }
    assert problems(machine, CUDA_13) == []
    assert verdict(machine, CUDA_13, 0, []) == "ready: runs on 8 GPUs"


def test_pairs_of_gpus_of_two_kinds_without_rdma(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    kinds = [["X", "NV4", "SYS"], ["NV4", "X", "SYS"], ["SYS", "SYS", "X"]]
    gpus = ["NVIDIA RTX A6000, 49140, 8.6"] * 2 + ["Tesla T4, 15360, 7.5"]
    nvidia_smi(gpus, "580.95.05", "13.0", topology(kinds, nics=0))
    machine = read_machine()
    report = gpu_report(machine, replace(CUDA_13, gpus=2))
    assert report["gpus"] == "GPU 0-1: NVIDIA RTX A6000, 48 GiB, compute capability 8.6"
    assert report["gpus 2"] == "GPU 2: Tesla T4, 15 GiB, compute capability 7.5"
    assert report["links"] == "NVLink (NV4) between 1 of 3 pairs, PCIe (SYS) between 2 of 3 pairs"
    assert report["network"] == "no RDMA device; NCCL uses TCP between machines"
    assert report["visible"] == "torch sees 2 (CUDA_VISIBLE_DEVICES=0,1)"
    assert problems(machine, CUDA_13) == []
    (bf16,) = cautions(machine, 2**34)
    assert "no fast bfloat16" in bf16


def test_one_gpu_has_no_links(nvidia_smi) -> None:
    nvidia_smi([H200], "595.10", "13.2")
    assert read_machine().links == {}
    assert "links" not in gpu_report(read_machine(), CUDA_13)


def test_a_field_that_the_gpu_does_not_report(nvidia_smi) -> None:
    nvidia_smi(["NVIDIA GB10, [N/A], [N/A]"], "580.95.05", "13.0")
    assert read_machine().gpus == (Gpu(0, "NVIDIA GB10", None, None),)
    assert gpu_report(read_machine(), CUDA_13)["gpus"] == "GPU 0: NVIDIA GB10"


def test_a_driver_that_does_not_respond(nvidia_smi) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch"
    nvidia_smi([], "", "", fails=said)
    machine = read_machine()
    assert machine == NvidiaMachine(error=f"nvidia-smi failed: {said}")
    (problem,) = problems(machine, replace(CUDA_13, gpus=0), hidden=8)
    assert problem.startswith(f"there are 8 NVIDIA GPUs on the PCI bus, but nvidia-smi failed: {said}; install")


def test_a_machine_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = read_machine()
    assert machine == NvidiaMachine(error="nvidia-smi is missing")
    assert gpu_report(machine, CPU) == {"gpus": "none (nvidia-smi is missing)"}
    assert problems(machine, CPU) == []
    assert verdict(machine, CPU, 0, []) == "ready: runs on the CPU"
    assert gpu_report(machine, CUDA_13)["driver"] == "unknown (nvidia-smi is missing)"  # as in a container


def test_gpus_without_a_driver_are_found_on_the_pci_bus(tmp_path: Path) -> None:
    for number, (vendor, kind) in enumerate(
        [("0x10de", "0x030200")] * 2 + [("0x10de", "0x040300"), ("0x8086", "0x030000")]
    ):
        device = tmp_path / f"0000:0{number}:00.0"
        device.mkdir()
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    assert count_pci_gpus(tmp_path) == 2  # neither NVIDIA's sound device nor Intel's display
    assert count_pci_gpus(tmp_path / "nowhere") == 0


def one(driver: str = "580.95.05", capability: tuple[int, int] = (9, 0)) -> NvidiaMachine:
    return NvidiaMachine((Gpu(0, "NVIDIA X", 81920, capability),), driver, "13.0")


@pytest.mark.parametrize(
    ("machine", "build", "sentence"),
    [
        (one(), CPU, "torch 2.13.0+cpu is built for the CPU; install the GPU builds: pip install --no-deps -r"),
        (one("570.172.08"), replace(CUDA_13, gpus=0), "the driver 570.172.08 is too old for CUDA 13.0, for which"),
        (one("470.1"), replace(CUDA_13, cuda="12.8", gpus=0), "install a driver of branch R525 or later."),
        (
            one(),
            replace(CUDA_13, gpus=0, error="CUDA unknown error"),
            "finds no GPU (CUDA unknown error); check the",
        ),
        (
            one(capability=(7, 0)),
            CUDA_13,
            "GPU 0 (NVIDIA X) has compute capability 7.0, but torch 2.14.0+cu130 has",
        ),
    ],
)
def test_a_gpu_that_cannot_be_used(machine, build, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (problem,) = problems(machine, build)
    assert sentence in problem
    assert verdict(machine, build, 0, [problem]) == "not ready: fix the problem above"


def test_an_older_driver_with_the_compatibility_package_is_accepted() -> None:
    """NVIDIA's cuda-compat lets an older driver run newer CUDA; torch then finds the GPU."""
    assert problems(one("570.172.08"), replace(CUDA_13, gpus=1)) == []


def test_hidden_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (problem,) = problems(one(), replace(CUDA_13, gpus=0))
    assert problem.startswith("torch finds no GPU with CUDA_VISIBLE_DEVICES=''; unset it")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True), ((10, 3), True), ((11, 0), False)],
)
def test_code_runs_on_later_gpus_of_the_same_generation(capability: tuple[int, int], runs: bool) -> None:
    assert (problems(one(capability=capability), CUDA_13) == []) is runs
    with_ptx = replace(CUDA_13, architectures=("sm_90a", "compute_90"))
    assert (problems(one(capability=capability), with_ptx) == []) is (capability >= (9, 0))


def test_blackwell_and_little_shared_memory_need_attention() -> None:
    two = NvidiaMachine(tuple(Gpu(i, "NVIDIA B200", 183359, (10, 0)) for i in range(2)), "580.95.05", "13.0")
    gradient, shared = cautions(two, 64 * 2**20)
    assert "pytorch issue 172439" in gradient
    assert shared.startswith("/dev/shm has 64 MiB")
    assert cautions(two, 2**34) == [gradient]


def test_links_of_one_kind_are_one_phrase() -> None:
    assert describe_links({(0, 1): "PHB"}) == "PCIe (PHB) between all GPUs"


def test_the_command_prints_problems_and_verdict_last(nvidia_smi, monkeypatch, capsys) -> None:
    nvidia_smi([H200] * 2, "580.95.05", "13.0", topology([["NV18"] * 2] * 2))
    monkeypatch.setattr(doctor, "read_torch", lambda: CPU)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "links         NVLink (NV18) between all GPUs" in lines
    assert lines[-2].startswith("problem: torch 2.13.0+cpu is built for the CPU; install the GPU builds")
    assert lines[-1] == "not ready: fix the problem above"
    assert max(map(len, lines)) < 140
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [gpu["name"] for gpu in found["gpus"]["gpus"]] == ["NVIDIA H200"] * 2
    assert found["gpus"]["torch"]["cuda"] is None
