"""Runs code that a model wrote, in a process of its own that is shut in (`shut_in`); `PROMISE` says what that means."""

from __future__ import annotations

import ast
import functools
import re
import secrets
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from offramp.errors import BadInput

SECONDS, PAUSES, BYTES = 10, 5, 2 << 30  # of a program: processor time, seconds beyond it, memory
REFUSED = 77  # the exit status where the system cannot shut a program in
ANSWER = "{answer}"  # stands in a program for an answer's code
PROMISE = (
    "Each runs shut in: without network and other processes, for at most 15 seconds, with 2 GB, and can write only to a "
    "folder that is then gone. It can still read all files that you can read."
)


def check(allowed: bool) -> None:
    """Raise `BadInput` if the user has not allowed that code runs, or if this system cannot shut it in."""
    if not allowed:
        raise BadInput(f"To score this, programs that the model writes must run. {PROMISE}", "To allow it: --run-code")
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
    with tempfile.TemporaryFile() as out:  # what a program writes to a file has a limit; to a pipe it has none
        try:
            # The limit of the processor's time ends a loop; this one also ends a program that sleeps.
            done = subprocess.run(
                command,
                input=sent,
                stdout=out,
                stderr=subprocess.PIPE,
                timeout=seconds + PAUSES,
                env={"LC_ALL": "C.UTF-8"},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
        out.seek(0)
        said = out.read(len(secret) + 1)
    if done.returncode == REFUSED and done.stderr:  # a program's own errors go nowhere
        raise _refused(done.stderr.decode("utf-8", "replace").strip())
    return said == secret.encode()


@functools.lru_cache(maxsize=4096)  # answers that begin alike hold the same code
def _solves(code: str, program: str) -> bool:
    before, _, after = program.partition(ANSWER)
    return passes(before + code + after)


def solves(answer: str, program: str) -> bool:
    """Whether a program passes with an answer's code in the place of {answer}. Raises as `passes` does."""
    return _solves(code_of(answer), program)


def code_of(answer: str) -> str:
    """The first block of code in an answer in Markdown; without a block, the whole answer.

    Lines at the end that are no whole statement are left out: they were cut off by the limit of tokens.
    """
    found = re.search(r"```[^\n]*\n(.*?)(?:\n```|\Z)", answer, re.DOTALL)
    lines = (found.group(1) if found else answer).split("\n")
    return next((code for code in ("\n".join(lines[:end]) for end in range(len(lines), 0, -1)) if _is_python(code)), "")


def _is_python(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in a text
        try:
            ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # a NUL; brackets that are nested too deeply
            return False
    return True


def _refused(reason: str) -> BadInput:
    return BadInput(
        f"This system cannot shut in what the model writes ({reason}), so it does not run.",
        "Use Linux 5.12 or newer with user namespaces, on x86-64 or aarch64, outside a container that forbids them.",
    )
