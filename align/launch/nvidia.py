"""The NVIDIA GPUs of this machine, their links and their driver, as nvidia-smi reports them. Does not import torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

FIELDS = ("index", "name", "memory.total", "compute_cap", "driver_version")
PATIENCE = 60.0
"""Time limit of nvidia-smi in seconds. Without persistence mode it initialises the driver first, which is slow."""
PCI_DEVICES = Path("/sys/bus/pci/devices")
PCI_VENDOR = "0x10de"
PCI_CLASSES = ("0x0300", "0x0302")
"""Prefixes of the PCI class codes of VGA and 3D controllers."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    index: number among all GPUs of the machine.
    memory_mib: total memory in MiB; None if nvidia-smi does not report it.
    capability: CUDA compute capability; None if nvidia-smi does not report it.
    """

    index: int
    name: str
    memory_mib: int | None
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class NvidiaMachine:
    """GPUs, driver and links of this machine, as nvidia-smi reports them.

    driver: driver version, such as 580.95.05.
    cuda: newest CUDA version that the driver supports.
    links: connection of each pair of GPUs, as in `nvidia-smi topo -m`: NV# (# NVLinks), PIX, PXB, PHB, NODE or SYS.
    network: names of RDMA devices.
    error: reason why nvidia-smi failed; None if it works. If it failed, the other fields are empty.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    links: dict[tuple[int, int], str] = field(default_factory=dict)
    network: tuple[str, ...] = ()
    error: str | None = None


def read_machine() -> NvidiaMachine:
    if shutil.which("nvidia-smi") is None:
        return NvidiaMachine(error="nvidia-smi is missing")
    try:
        table = _nvidia_smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
        gpus, driver = parse_gpus(table)
        cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)", _nvidia_smi())
        links, network = parse_topology(_nvidia_smi("topo", "-m")) if len(gpus) > 1 else ({}, ())
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return NvidiaMachine(error=f"nvidia-smi failed: {error}")
    return NvidiaMachine(gpus, driver, cuda[1] if cuda else None, links, network)


def _nvidia_smi(*arguments: str) -> str:
    """Output of nvidia-smi. If nvidia-smi fails, raises `ValueError` with the output's first line."""
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        said = (done.stdout + done.stderr).strip() or f"exit status {done.returncode}"
        raise ValueError(said.splitlines()[0].strip())
    return done.stdout


def parse_gpus(table: str) -> tuple[tuple[Gpu, ...], str | None]:
    """(GPUs, driver version) from a CSV table with the columns `FIELDS`."""
    gpus, driver = [], None
    for line in table.splitlines():
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(FIELDS) or not cells[0].isdecimal():
            raise ValueError(f"unexpected line '{line.strip()}'")
        index, name, memory, capability, driver = cells
        numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
        gpus.append(
            Gpu(
                int(index),
                name,
                int(memory) if memory.isdecimal() else None,
                (int(numbers[1]), int(numbers[2])) if numbers else None,
            )
        )
    return tuple(gpus), driver


def parse_topology(text: str) -> tuple[dict[tuple[int, int], str], tuple[str, ...]]:
    """(connection of each pair of GPUs, names of RDMA devices) from the matrix of `nvidia-smi topo -m`."""
    rows = [words for line in text.splitlines() if (words := re.sub(r"\x1b\[[\d;]*m", "", line).split())]
    if not rows or not re.fullmatch(r"GPU\d+", rows[0][0]):
        raise ValueError("`nvidia-smi topo -m` prints no matrix")
    columns = [word for word in rows[0] if re.fullmatch(r"(GPU|NIC)\d+", word)]
    links = {}
    for name, *cells in rows[1:]:
        for other, kind in zip(columns, cells, strict=False):
            if name.startswith("GPU") and other.startswith("GPU") and int(name[3:]) < int(other[3:]):
                links[int(name[3:]), int(other[3:])] = kind
    network = re.findall(r"^\s*NIC\d+: (\S+)", text, re.MULTILINE)
    return links, tuple(network)


def describe_gpus(gpus: tuple[Gpu, ...]) -> list[str]:
    """One line for consecutive equal GPUs, such as 'GPU 0-7: NVIDIA H200, 140 GiB, compute capability 9.0'."""
    lines = []
    for (name, memory, capability), same in groupby(gpus, lambda gpu: (gpu.name, gpu.memory_mib, gpu.capability)):
        numbers = [gpu.index for gpu in same]
        which = f"GPU {numbers[0]}" if len(numbers) == 1 else f"GPU {numbers[0]}-{numbers[-1]}"
        facts = [name]
        if memory is not None:
            facts.append(f"{memory / 1024:.0f} GiB")
        if capability is not None:
            facts.append(f"compute capability {capability[0]}.{capability[1]}")
        lines.append(f"{which}: {', '.join(facts)}")
    return lines


def describe_links(links: dict[tuple[int, int], str]) -> str:
    """Summary of the connections of all pairs of GPUs, such as 'NVLink (NV18) between all GPUs'."""
    counts = Counter(links.values())
    names = {
        kind: f"NVLink ({kind})" if kind.startswith("NV") else f"PCIe ({kind})"
        for kind in sorted(counts, key=lambda kind: (not kind.startswith("NV"), kind))
    }
    if len(names) == 1:
        return f"{next(iter(names.values()))} between all GPUs"
    return ", ".join(f"{name} between {counts[kind]} of {len(links)} pairs" for kind, name in names.items())


def count_pci_gpus(devices: Path = PCI_DEVICES) -> int:
    """Number of NVIDIA GPUs on the PCI bus, with or without a driver; 0 if the bus cannot be read."""
    found = 0
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        found += vendor == PCI_VENDOR and kind.startswith(PCI_CLASSES)
    return found
