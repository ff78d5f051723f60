"""Attacks that strangers may try, on the real sandbox and the real server: each must fail, and harm nobody else."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import pytest

from offramp import sandbox, sandbox_child
from offramp.errors import BadInput

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="programs can be shut in on Linux only")


# The sandbox ---------------------------------------------------------------------------------------


def raises(kind: str, statement: str) -> str:
    """A program that passes only if the statement raises this error."""
    return f"try:\n    {statement}\nexcept {kind}:\n    pass\nelse:\n    raise SystemExit(1)\n"


@linux_only
@pytest.mark.parametrize(
    "program",
    [
        "import threading\nthreads = [threading.Thread(target=int) for _ in range(8)]\n"
        "for each in threads: each.start()\nfor each in threads: each.join()",
        "open('own', 'w').write('x')\nassert open('/tmp/own').read() == 'x'",
        "import os\nos.mkdir('own')\nos.rename('own', 'other')\nos.rmdir('other')",
        "print('noise', flush=True)",
        "import signal, time\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.alarm(1)\nsignal.pause()",
        "import ctypes\nassert ctypes.CDLL(None).prctl(15, b'own', 0, 0, 0) == 0",  # its own name
        "import collections, datetime, decimal, hashlib, itertools, random, sqlite3, tempfile, zoneinfo\nrandom.random()",
    ],
)
def test_what_harms_nobody_is_allowed(program: str) -> None:
    assert sandbox.passes(program)


@linux_only
@pytest.mark.parametrize(
    "program",
    [
        raises("PermissionError", "import os; os.fork()"),
        raises("OSError", "import subprocess; subprocess.run(['true'])"),
        raises("PermissionError", "import os; os.execv('/usr/bin/true', ['true'])"),
        raises("OSError", "import socket; socket.create_connection(('127.0.0.1', 22), 1)"),
        raises("OSError", "import socket; socket.getaddrinfo('example.org', 80)"),
        raises("PermissionError", "import socket; socket.socket(socket.AF_UNIX)"),
        raises("PermissionError", "import socket; socket.socketpair()"),
        raises("PermissionError", "import os; os.mkfifo('own')"),
        raises("PermissionError", "import os; os.mknod('own', 0o20666, os.makedev(1, 3))"),
        raises("PermissionError", "import os; os.memfd_create('own')"),
        raises("OSError", "open('/dev/null', 'w')"),
        raises("OSError", "open('/proc/self/cmdline')"),
        raises("OSError", "open('/etc/passwd')"),
        raises("OSError", "open(HERE + '/kept')"),
        raises("OSError", "open(HERE + '/new', 'w')"),
        raises("OSError", "import os; os.remove(HERE + '/kept')"),
        raises("OSError", "open('/new', 'w')"),
        raises("OSError", "import os; open(os.__file__, 'a')"),
        raises("OSError", "import os; os.chmod(os.__file__, 0o777)"),
        "import os\nassert os.listdir('/proc') == os.listdir('/dev') == os.listdir('/tmp') == []",
        "import os\nassert (os.getpid(), os.getppid()) == (1, 0) and os.getsid(0) == 0",  # nobody to send signals to
        "import os\nassert os.getuid() == os.getgid() == 65534",
        "import os\nassert set(os.environ) <= {'LC_ALL', 'LC_CTYPE'}, os.environ",
    ],
)
def test_nothing_leads_out(program: str, tmp_path) -> None:
    (tmp_path / "kept").touch()
    assert sandbox.passes(f"HERE = {str(tmp_path)!r}\n" + program)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "kept"]


@linux_only
def test_every_call_that_is_not_listed_is_refused() -> None:
    """All numbers there are, with arguments that would do no harm; clone, prctl and ioctl with all kinds of flags."""
    column, _ = sandbox_child.MACHINES[os.uname().machine]
    listed = {numbers[column] for numbers in sandbox_child.CALLS.values()}
    probes = (335, 336)  # of x86-64: they end a process that calls them itself, before any filter
    checked = [number for number in range(1024) if number not in listed and number not in probes]
    flags = [1 << bit for bit in range(32)] + [0, 0x3D0F00 | 0x10000000, 0x3D0F00 | 0x20000, 0x11]
    first = {sandbox_child.CLONE[column]: flags, sandbox_child.PRCTL[column]: [*range(15), *range(17, 80)]}
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in {checked}:
    for argument in {first}.get(number, [0]):
        ctypes.set_errno(0)
        assert libc.syscall(number, ctypes.c_ulong(argument), 0, 0, 0, 0, 0) == -1, (number, argument)
        assert ctypes.get_errno() in {(errno.EPERM, errno.ENOSYS, errno.ENOTTY)}, (number, argument, ctypes.get_errno())
"""
    assert sandbox.passes(program)


@linux_only
@pytest.mark.parametrize(
    "program",
    [
        raises("MemoryError", "bytearray(3 << 30)"),
        raises("(MemoryError, OSError)", "import mmap; [mmap.mmap(-1, 1 << 28) for _ in range(16)]"),
        raises("OSError", "[open(str(n), 'wb').write(bytes(1 << 23)) for n in range(32)]"),
        raises("OSError", "[open(str(n), 'w').close() for n in range(5000)]"),
        raises("OSError", "import os; [os.mkdir(str(n)) for n in range(5000)]"),
        raises("OSError", "import os; [os.pipe() for _ in range(64)]"),
        raises("RuntimeError", "import threading, time\n    for _ in range(64): threading.Thread(target=time.sleep, args=(5,), daemon=True).start()"),  # noqa: E501
        raises("OSError", "import os\n    while True: os.write(1, bytes(1 << 20)) and os.write(9, b'')"),
        raises("(ValueError, OSError)", "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"),
    ],
)  # fmt: skip
def test_memory_files_and_threads_have_limits(program: str) -> None:
    assert sandbox.passes(program)


@linux_only
@pytest.mark.parametrize("program", ["assert False", "exit()", "import os; os._exit(0)", "x = (", "x = '\0'", "exit(77)"])
def test_a_program_that_ends_early_has_not_passed(program: str) -> None:
    assert not sandbox.passes(program)


@linux_only
@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "def double(x):\n    while True: pass"]
)
def test_a_program_that_does_not_end_is_ended(program: str, monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "PAUSES", 1)
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    started = time.monotonic()
    assert not sandbox._tried("", program, "double(1)", seconds=1)
    assert time.monotonic() - started < 20
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not any(program.encode() in command for command in commands)


FORGERIES = {
    "ends as if all were well": "import os\nos._exit(0)",
    "ends in the call": "import os\ndef double(x): os._exit(0)",
    "equals everything": "class Any:\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef double(x): return Any()",
    "equals everything and is a number": "class Any(int):\n    __eq__ = lambda *_: True\ndef double(x): return Any(7)",
    "redefines what tests use": "def abs(x): return 0\ndef close(x, y): return True\ndef double(x): return 7",
    "redefines the check": "def check(f): pass\ndef double(x): return 7",
    "changes Python": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = int\ndef double(x): return 7",
    "looks for a secret": """
import gc, os, sys
frame, found = sys._getframe(), gc.get_objects()
while frame:
    found += frame.f_locals.values()
    frame = frame.f_back
for each in found:
    for end in range(3, 16):
        try: os.write(end, each if isinstance(each, bytes) else str(each).encode())
        except Exception: pass
os._exit(0)
""",
    "answers before it is asked": """
import json, os
for said in ({"double": None, "check": None, "abs": None, "math": None}, [None, ["int", "0x4"]]):
    for end in range(3, 16):
        try: os.write(end, json.dumps(said).encode() + b"\n")
        except OSError: pass
def double(x): return 7
""",
    "changes the process that runs it": """
import sys
def double(x): sys._getframe(1).f_globals["plain"] = lambda _: ["type", "x"]
""",
    "fills the judge's memory": "def double(x): return [0] * (1 << 26)",
    "nests without end": "def double(x):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "raises without end": "class E(Exception): pass\nE.__name__ = 'KeyboardInterrupt'\ndef double(x): raise E",
}
TESTS = (
    "import math\ndef close(x, y):\n    return math.fabs(x - y) < 1e-6\n\n{answer}\n\n"
    "def check(candidate):\n    for x in range(4):\n        assert candidate(x) == 2 * x\n"
    "        assert abs(candidate(x) - 2 * x) == 0 and close(candidate(x), 2 * x)\n\ncheck(double)\n"
)


@linux_only
@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_program_cannot_forge_its_verdict(forgery: str) -> None:
    assert not sandbox.solves(f"```python\n{forgery}\n```", TESTS)


@linux_only
def test_tests_see_what_the_program_returns() -> None:
    assert sandbox.solves("def double(x):\n    return 2 * x", TESTS)
    program = "{answer}\n" + "".join(
        f"assert same({value}) == {value}\n"
        for value in (
            "None",
            "True",
            "-3",
            "10**5000",
            "2.5",
            "float('inf')",
            "'\\ud800é'",
            "b'\\0'",
            "1j",
            "[(1, 2), {3}]",
            "int",
        )
    )
    program += "assert list(same(iter([1]))) == [1] and isinstance(same(frozenset()), frozenset) and LIMIT == {1: 'a'}\n"
    program += "try:\n    fails()\nexcept KeyError:\n    pass\nelse:\n    raise SystemExit(1)\n"
    assert sandbox.solves("LIMIT = {1: 'a'}\ndef same(x):\n    return x\ndef fails():\n    return {}[1]", program)


@linux_only
@pytest.mark.parametrize(
    ("kernel_feature", "without", "reason"),
    [
        ("NEW_PROCESSES | NEW_NETWORK", "0x40", "no namespaces"),
        ("MS_BIND | MS_REC", "0", "no files"),
        ("SECCOMP_MODE_FILTER, ctypes", "9, ctypes", "any system call can be made"),
    ],
)
def test_where_the_system_offers_less_nothing_runs(kernel_feature, without, reason, tmp_path, monkeypatch) -> None:
    child = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    assert child.count(kernel_feature) == 1
    (tmp_path / "sandbox_child.py").write_text(child.replace(kernel_feature, without))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(BadInput, match=f"cannot shut in .*{reason}"):
        sandbox.check(allowed=True)
