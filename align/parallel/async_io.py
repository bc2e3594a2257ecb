"""What DeepSpeed reaches a disk with: a library that torch compiles on this machine at its first use."""

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
    """Raise `UserError` where DeepSpeed cannot reach an NVMe disk. It compiles what it needs for that, once."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "parallel.offload: DeepSpeed reaches nvme through libaio, which is not installed; install libaio-dev, or "
            "write cpu."
        )
    try:
        with compiling_alone(extensions_folder()) as folder:
            if not (folder / LIBRARY).is_file():
                print(f"compiling what DeepSpeed reaches a disk with, once, in {folder} (minutes)", flush=True)
            AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"parallel.offload: what DeepSpeed reaches nvme with cannot be compiled ({reason}); install a C++ compiler "
            "and ninja, or write cpu."
        ) from None


def extensions_folder() -> Path:
    """A folder of align's own in the place where torch keeps what it has compiled, for these versions."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root) / "align" / f"torch-{version('torch')}-deepspeed-{version('deepspeed')}"


@contextmanager
def compiling_alone(folder: Path) -> Iterator[Path]:
    """Within it torch compiles and loads in `folder`, where one process at a time is let in.

    torch marks what it works on by a file `lock`, which stays when the process is killed and for which every later one
    would wait without end. The operating system takes this lock here from a process that dies, and whoever has it
    knows that no other is at work, whatever files say so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with open(folder / ".alone", "w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            left.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["TORCH_EXTENSIONS_DIR"]
            else:
                os.environ["TORCH_EXTENSIONS_DIR"] = before
