"""Runs code that a model wrote, in a process of its own that is shut in (`shut_in`); `PROMISE` says what that means."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

from offramp.errors import BadInput

SECONDS, BYTES = 10, 2 << 30  # of a program
REFUSED = 77  # the exit status where the system cannot shut a program in
PROMISE = (
    "Each runs shut in: without network and other processes, for at most 10 seconds, with 2 GB, and can write only to a "
    "folder that is then gone. It can still read all files that you can read."
)


def check() -> None:
    """Raise `BadInput` if this system cannot shut a program in, or if it does not run there."""
    if not passes("import collections, json, math, re, typing"):
        raise _refused("Python's own library is out of reach there")


def passes(program: str, seconds: int = SECONDS) -> bool:
    """Whether a program of Python ends without an error, within limits of time and memory.

    Raises `BadInput` where the system cannot shut it in.
    """
    if sys.platform != "linux":
        raise _refused("that needs Linux")
    secret = secrets.token_hex(16)
    numbers = map(str, (seconds, BYTES, REFUSED))
    command = [sys.executable, "-I", str(Path(__file__).with_name("shut_in.py")), *numbers]
    sent = f"{secret}\n{program}".encode("utf-8", "replace")
    try:
        # The limit of the processor's time ends a loop; this one also ends a program that sleeps.
        done = subprocess.run(
            command, input=sent, capture_output=True, timeout=seconds + 5, env={"LC_ALL": "C.UTF-8"}, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == REFUSED and done.stderr:  # a program's own errors go nowhere
        raise _refused(done.stderr.decode("utf-8", "replace").strip())
    return done.stdout == secret.encode()


def _refused(reason: str) -> BadInput:
    return BadInput(
        f"This system cannot shut in what the model writes ({reason}), so it does not run.",
        "Use Linux 5.12 or newer with user namespaces, on x86-64 or aarch64, outside a container that forbids them.",
    )
