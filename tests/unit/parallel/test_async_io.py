"""One process at a time compiles DeepSpeed's async_io, and a killed process does not block the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from align.parallel.async_io import compiling_alone

HOLDER = """
import sys, time
from pathlib import Path
from align.parallel.async_io import compiling_alone
from torch.utils.file_baton import FileBaton
with compiling_alone(Path(sys.argv[1])) as folder:
    (folder / "async_io").mkdir()
    FileBaton(str(folder / "async_io" / "lock")).try_acquire()
    print("compiling", flush=True)
    time.sleep(600)
"""
WAITER = """
import sys
from pathlib import Path
from align.parallel.async_io import compiling_alone
with compiling_alone(Path(sys.argv[1])):
    print("inside", flush=True)
"""


def start(script: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)


def test_a_process_waits_for_a_running_one_and_not_for_a_killed_one(tmp_path: Path) -> None:
    holder = start(HOLDER, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "compiling\n"
    waiter = start(WAITER, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(3)
    holder.kill()
    holder.wait()
    assert waiter.communicate(timeout=60)[0] == "inside\n"
    assert FileBaton(str(tmp_path / "async_io" / "lock")).try_acquire()  # no stale lock is left


def test_torch_compiles_in_the_folder_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "theirs"))
    with compiling_alone(tmp_path / "ours"):
        assert Path(_get_build_directory("async_io", False)).parent == tmp_path / "ours"
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "theirs")
