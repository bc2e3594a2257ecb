"""Attacks on the sandbox, with the required outcomes. As a program: run all as this user, print the results as JSON.

    python -m tests.unit.reward.sandbox_attacks [PYTHON [BWRAP]]

It needs only the standard library and `align.reward.sandbox`, so that any user with any interpreter can run it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from align.reward.sandbox.sandbox import TIMEOUT, TOO_MUCH, Limits, ProgramRun, Sandbox

HOME = os.path.expanduser("~")
TRY = """
def attempt(name, action):
    try:
        result = action()
    except BaseException as error:
        print(name, type(error).__name__, getattr(error, 'errno', None) or '')
    else:
        print(name, 'DONE', result)

"""
"""Each attempt prints the exception that stopped it, or DONE."""

COUNT_FORKS = """
import os, time
count = 0
for _ in range(300):
    try:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        count += 1
    except OSError:
        pass
print(count)
"""
COUNT_THREADS = """
import _thread, os, time
_thread.stack_size(32768)
count = 0
try:
    for _ in range(5000):
        _thread.start_new_thread(time.sleep, (30,))
        count += 1
except BaseException:
    pass
os.write(1, b'%d' % count)
os._exit(0)
"""
# number on x86-64 and arm64, of calls that no calculation needs
CALLS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "keyctl": (250, 219), "add_key": (248, 217), "memfd_create": (319, 279), "kexec_load": (246, 104),
    "open_by_handle_at": (304, 265), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "personality": (135, 92), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "socket": (41, 198), "connect": (42, 203), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "setsid": (112, 157), "setpgid": (109, 154),
    "fchmodat": (268, 53), "fchownat": (260, 54), "utimensat": (280, 88), "setxattr": (188, 5), "reboot": (169, 142),
    "sethostname": (170, 161), "swapon": (167, 224), "init_module": (175, 105), "seccomp": (317, 277),
}  # fmt: skip
RAW_CALLS = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
column = {{'x86_64': 0, 'aarch64': 1}}[os.uname().machine]
for name, numbers in {CALLS!r}.items():
    result = libc.syscall(numbers[column], 0, 0, 0, 0, 0, 0)
    if result != -1 or ctypes.get_errno() != 1:
        print(name, result, ctypes.get_errno())
"""


def programs(folder: Path, port: int, abstract: str) -> dict[str, tuple[str, Callable[[ProgramRun], bool]]]:
    """Attacks by name, with the check of their result. folder: has the file `ours`. port, abstract: of listeners."""

    def stopped(*errors: str) -> Callable[[ProgramRun], bool]:
        """True if every attempt failed, with one of these errors if any are given."""

        def check(run: ProgramRun) -> bool:
            lines = [line.split() for line in run.output.splitlines()]
            return bool(lines) and all(
                line[1] != "DONE" and (not errors or " ".join(line[1:]) in errors) for line in lines
            )

        return check

    no_child = stopped("BlockingIOError 11")
    refused = stopped("PermissionError 1")
    ours = repr(str(folder / "ours"))
    return {
        "endless loop": ("while True: pass", lambda run: "limit" in run.problem),
        "sleep": ("import time; time.sleep(600)", lambda run: run.problem == TIMEOUT),
        "ignores signals": (
            "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nwhile True: pass",
            lambda run: "limit" in run.problem,
        ),
        "memory": ("x = bytearray(1536 << 20)", lambda run: run.problem == "MemoryError"),
        "fork": (COUNT_FORKS, lambda run: run.output == "0\n"),
        "threads": (COUNT_THREADS, lambda run: 0 < int(run.output or 0) < 2000),
        "subprocess": (
            TRY + "import subprocess, os\nattempt('run', lambda: subprocess.run(['/bin/true']))\n"
            "attempt('system', lambda: 1 / (os.system('true') == 0))\n"
            "attempt('spawn', lambda: os.posix_spawn('/bin/true', ['true'], {}))\n"
            "attempt('exec', lambda: os.execv('/bin/true', ['true']))\n",
            stopped(),
        ),
        "daemon": (TRY + "import os\nattempt('fork', os.fork)", no_child),
        "leave the group": (
            TRY + "import os\nattempt('setsid', os.setsid)\nattempt('setpgid', lambda: os.setpgid(0, 0))",
            refused,
        ),
        "read files": (
            TRY + "import os\n"
            + "".join(
                f"attempt({path!r}, lambda: open({path!r}, 'rb').read(9))\n"
                for path in ("/etc/passwd", "/etc/hostname", "/proc/1/environ", "/proc/self/environ", "/proc/self/mem",
                             os.path.join(HOME, ".bashrc"), str(folder / "ours"), __file__)
                if os.path.exists(path)
            )
            + f"attempt('list', lambda: os.listdir('/'))\nattempt('home', lambda: os.listdir({HOME!r}))\n",
            stopped("PermissionError 13", "FileNotFoundError 2"),
        ),
        "delete and change files": (
            TRY + f"import os\nattempt('remove', lambda: os.remove({ours}))\n"
            f"attempt('write', lambda: open({ours}, 'w'))\nattempt('truncate', lambda: os.truncate({ours}, 0))\n"
            f"attempt('chmod', lambda: os.chmod({ours}, 0))\nattempt('utime', lambda: os.utime({ours}))\n"
            f"attempt('chown', lambda: os.chown({ours}, 0, 0))\n"
            f"attempt('rename', lambda: os.rename({ours}, '/tmp/x'))\n"
            f"attempt('link', lambda: os.link({ours}, '/tmp/x'))\n",
            stopped("PermissionError 1", "PermissionError 13", "FileNotFoundError 2", "OSError 18", "OSError 30"),
        ),
        "fill the disk": (
            TRY + "import os\nfor folder in ('/tmp', '/dev/shm', '/var/tmp', '.', os.path.expanduser('~')):\n"
            "    attempt('open', lambda: open(folder + '/full', 'wb').write(bytes(200 << 20)))\n",
            stopped("PermissionError 13", "FileNotFoundError 2", "OSError 30"),
        ),
        "network": (
            TRY + "import socket\n"
            f"attempt('tcp', lambda: socket.create_connection(('127.0.0.1', {port}), timeout=2))\n"
            "attempt('udp', lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9)))\n"
            f"attempt('unix', lambda: socket.socket(socket.AF_UNIX).connect({abstract!r}))\n"
            f"attempt('pair', lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', {abstract!r}))\n",
            refused,
        ),
        "much output": (
            "import sys\nfor _ in range(300): sys.stdout.write('x' * (1 << 20))",
            lambda run: run.problem == TOO_MUCH and len(run.output) <= 1 << 16,
        ),
        "signals": (
            TRY + "import os\nfor pid in (1, os.getppid(), -1):\n"
            "    attempt('kill', lambda: os.kill(pid, 0))\n",
            refused,
        ),
        "raise limits": (
            TRY + "import os, resource as r\n"
            "for kind in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE):\n"
            "    attempt('limit', lambda: r.setrlimit(kind, (r.RLIM_INFINITY, r.RLIM_INFINITY)))\n"
            "attempt('other', lambda: r.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1)))\n",
            stopped("ValueError", "PermissionError 1"),
        ),
        "environment": (
            "import os; print([k for k in os.environ if 'SECRET' in k])",
            lambda run: run.output == "[]\n",
        ),
        "raw system calls": (RAW_CALLS, lambda run: run.ended and run.output == ""),
        "crash": ("import ctypes; ctypes.string_at(0)", lambda run: "SIGSEGV" in run.problem),
    }  # fmt: skip


TESTS = ["assert f(2) == 4", "assert f(3) == 9 and f(-1) == 1"]
FORGED = {
    "exit status 0": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "exit in the function": "def f(x):\n    import os; os._exit(0)",
    "equals everything": "class E:\n    def __eq__(self, o): return True\n    __ne__ = __eq__\ndef f(x): return E()",
    "a number that equals everything": "class E(int):\n    def __eq__(self, o): return True\ndef f(x): return E(0)",
    "true whatever happens": "class E:\n    def __bool__(self): return True\n    def __lt__(self, o): return self\n"
    "    __eq__ = __lt__\ndef f(x): return E()",
    "patched built-ins": "import builtins\n"
    "builtins.AssertionError = None\nbuiltins.all = lambda x: True\ndef f(x): return 0",
    "own built-ins": "def all(x): return True\ndef f(x): return 0\nassert_ = True",
    "writes the verdict everywhere": "import os\nfor d in range(64):\n"
    "    for text in (b'passed\\n', b'0' * 32 + b' passed\\n'):\n"
    "        try: os.write(d, text)\n        except OSError: pass\ndef f(x): return 0",
    "forged replies": "import os, json, struct\n"
    "data = json.dumps(['names', {'f': 'os'}]).encode()\nfor d in range(3, 64):\n"
    "    try: os.write(d, struct.pack('<I', len(data)) + data)\n    except OSError: pass\ndef f(x): return 0",
    "reads the tests": "import os, gc\nfound = []\nfor d in range(64):\n    try:\n        os.set_blocking(d, False)\n"
    "        found.append(os.read(d, 1 << 20))\n    except OSError: pass\n"
    "texts = [o for o in gc.get_objects() if isinstance(o, (str, dict)) and 'assert' + ' f(2)' in str(o)]\n"
    "answers = {2: 4, 3: 9, -1: 1} if texts or any(b'assert f' in t for t in found) else {}\n"
    "def f(x): return answers.get(x, 0)",
    "raises AssertionError": "def f(x): raise AssertionError",
    "ends the tests by StopIteration": "def f(x): raise StopIteration",
    "closes its pipes": "import os\ndef f(x):\n    os.closerange(0, 64)\n    return 4",
}  # fmt: skip


def attack(python: str | None = None, bubblewrap: str | None = None) -> dict[str, object]:
    """Run every attack as this user; returns {attack: True, or what happened}."""
    os.environ["SECRET_TOKEN"] = "s3cret"
    # The first program may take a while to start on a busy machine; what must be stopped early is stopped by its limit.
    sandbox = Sandbox(Limits(wall_s=60, cpu_s=2), python=python, bubblewrap=bubblewrap)
    sleeping = Sandbox(Limits(wall_s=3), python=python, bubblewrap=bubblewrap)
    found: dict[str, object] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        abstract = f"\0align-sandbox-{os.getpid()}"
        unix.bind(abstract)
        unix.listen()
        folder = Path(name)
        (folder / "ours").write_text("ours")
        before = (folder / "ours").stat().st_mtime_ns
        for title, (code, check) in programs(folder, tcp.getsockname()[1], abstract).items():
            run = (sleeping if title == "sleep" else sandbox).run_program(code)
            found[title] = check(run) or f"{run.problem} {run.output[:2000]}"
        kept = folder / "ours"
        found["our file is as before"] = kept.read_text() == "ours" and kept.stat().st_mtime_ns == before
    for title, code in FORGED.items():
        tested = sandbox.run_tests(code, TESTS)
        found[f"forged: {title}"] = tested.passed == [False, False] or f"{tested}"
    time.sleep(0.2)
    mine = [pid for pid in os.listdir("/proc") if pid.isdigit() and _is_launcher(int(pid))]
    found["no process is left"] = not mine or f"{mine}"
    return found


def _is_launcher(pid: int) -> bool:
    """True for a sandbox that this process has started, directly or not, or that lost its parent."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return False
    return b"align.reward.sandbox.launcher" in command and parent in (1, os.getpid())


if __name__ == "__main__":
    print(json.dumps(attack(*sys.argv[1:])))
