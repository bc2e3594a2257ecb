"""Compile async_io, DeepSpeed's library for NVMe offload, on this machine at its first use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from align.errors import UserError

LIBRARY = "async_io/async_io.so"


def require_async_io() -> None:
    """Compile and load DeepSpeed's library for NVMe offload; raises `UserError` if this fails."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "parallel.offload: nvme needs libaio, which is not installed; install libaio-dev, or set cpu instead."
        )
    try:
        with compiling_alone(extensions_folder()) as folder:
            if not (folder / LIBRARY).is_file():
                print(f"compiling DeepSpeed's async_io, once, in {folder} (takes minutes)", flush=True)
            AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"parallel.offload: DeepSpeed's async_io, which nvme needs, cannot be compiled ({reason}); install a C++ "
            "compiler and ninja, or set cpu instead."
        ) from None


def extensions_folder() -> Path:
    """align's folder in torch's build root; each pair of torch and DeepSpeed versions has its own."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root) / "align" / f"torch-{version('torch')}-deepspeed-{version('deepspeed')}"


@contextmanager
def compiling_alone(folder: Path) -> Iterator[Path]:
    """Let torch compile and load extensions in `folder` within the block, one process at a time.

    torch guards a build by a file named `lock`. A killed process leaves this file behind, and every later process then
    waits forever. So a process first takes a lock that the operating system releases when the process dies. While a
    process holds that lock, any `lock` file is stale and can be removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with open(folder / ".alone", "w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["TORCH_EXTENSIONS_DIR"]
            else:
                os.environ["TORCH_EXTENSIONS_DIR"] = before
