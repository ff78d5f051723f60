"""Runs code that a model wrote, in a process that is shut in, and its tests in another one (`sandbox_child`).

`PROMISE` says what that means. The tests call the code's functions. Arguments and results are plain data: numbers, texts,
lists, tuples, sets, dicts, iterators. So tests of an answer's own classes fail.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from offramp.errors import BadInput

SECONDS, PAUSES, BYTES = 10, 5, 2 << 30  # of a program: processor time, seconds beyond it, memory
REFUSED = 77  # the exit status where the system cannot shut a program in
ANSWER = "{answer}"  # stands in a program for an answer's code
PROMISE = (
    "Each runs shut in: without network, devices and other processes, for at most 15 seconds, with 2 GB. It sees the files "
    "of Python and of the system's libraries, and can write only to a folder in memory that is then gone."
)
TRIES = 32  # to find the whole statements of an answer


def check(allowed: bool) -> None:
    """Raise `BadInput` if the user has not allowed that code runs, or if this system cannot shut it in."""
    if not allowed:
        raise BadInput(f"To score this, programs that the model writes must run. {PROMISE}", "To allow it: --run-code")
    if not passes("import collections, json, math, re, typing"):
        raise _refused("Python's own library is out of reach there")


def passes(program: str, seconds: int = SECONDS) -> bool:
    """Whether a program of Python runs to its end without an error, within limits of time and memory. Raises as `check`."""
    return _tried("", program, "", seconds)


def _tried(before: str, program: str, tests: str, seconds: int = SECONDS) -> bool:
    """Whether tests pass that call a program's functions. Each runs in a process of its own, after the code `before`."""
    if sys.platform != "linux":
        raise _refused("that needs Linux")
    code = json.dumps([before, program, tests]).encode()
    asked, calls, told, answers = *os.pipe(), *os.pipe()
    with ExitStack() as children:
        try:
            children.enter_context(_child("program", seconds, code, asked, answers))
            judge = children.enter_context(_child("judge", seconds, code, told, calls))
        finally:
            for end in (asked, calls, told, answers):
                os.close(end)
        with suppress(subprocess.TimeoutExpired):  # of a program that sleeps; a loop's processor time ends sooner
            judge.wait(seconds + PAUSES)
    return judge.returncode == 0


@contextmanager
def _child(role: str, seconds: int, code: bytes, reads: int, writes: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process of `sandbox_child`, which is ended at the end. Raises `BadInput` if the system cannot shut it in."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("sandbox_child.py")), role]
    with tempfile.TemporaryFile() as sent, tempfile.TemporaryFile() as errors:
        sent.write(code)
        sent.seek(0)
        process = subprocess.Popen(
            [*command, *map(str, (seconds, BYTES, reads, writes, REFUSED))],
            stdin=sent,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(reads, writes),
            env={"LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        reason = errors.read(200).decode("utf-8", "replace").strip()
        if process.returncode == REFUSED and reason:  # a program's own errors go nowhere
            raise _refused(reason)


@functools.lru_cache(maxsize=4096)  # answers that begin alike hold the same code
def _solves(code: str, program: str) -> bool:
    before, _, tests = program.partition(ANSWER)
    return _tried(before, code, tests)


def solves(answer: str, program: str) -> bool:
    """Whether a program passes with an answer's code in the place of {answer}. Raises as `passes` does.

    What stands behind {answer} are the tests. A name that they use and the program does not define is the answer's.
    """
    return _solves(code_of(answer), program)


def code_of(answer: str) -> str:
    """The first block of code in an answer in Markdown; without a block, the whole answer.

    Lines at the end that are no whole statement are left out: they were cut off by the limit of tokens. Takes time that is
    linear in the answer's length.
    """
    fence = answer.find("```")
    begin = answer.find("\n", fence) if fence >= 0 else -1
    if begin >= 0:
        end = answer.find("\n```", begin)
        answer = answer[begin + 1 : end if end >= 0 else None]
    lines = answer.split("\n")
    for _ in range(TRIES):
        code = "\n".join(lines)
        whole = _whole_lines(code)
        if whole is None:
            return code
        lines = lines[: min(whole, len(lines) - 1)]
    return ""


def _whole_lines(code: str) -> int | None:
    """How many lines stand before the first that is no Python; None if all is Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in a text
        try:
            ast.parse(code)
        except SyntaxError as error:
            return max(0, (error.lineno or 1) - 1)
        except (ValueError, RecursionError, MemoryError):  # a NUL; brackets that are nested too deeply
            return 0
    return None


def _refused(reason: str) -> BadInput:
    return BadInput(
        f"This system cannot shut in what the model writes ({reason}), so it does not run.",
        "Use Linux 5.12 or newer with user namespaces, on x86-64 or aarch64, outside a container that forbids them.",
    )
