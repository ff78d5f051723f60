"""Tasks of code: prompts, what counts as an answer's code, and programs that are shut in."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from offramp import sandbox
from offramp.errors import BadInput
from offramp.evaluation.code import score_code
from offramp.evaluation.tasks import load_task

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="programs can be shut in on Linux only")
PROMPT = 'import math\n\n\ndef root(x: float) -> float:\n    """The square root of x."""\n'
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "test": "def check(candidate):\n    assert candidate(9.0) == 3\n",
    "entry_point": "root",
    "canonical_solution": "    return math.sqrt(x)\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function that doubles.",
    "code": "def double(x):\n    return 2 * x",
    "test_setup_code": "one = 1",
    "test_list": ["assert double(one) == 2", "assert double(4) == 8"],
}


def written(folder: Path, *rows: dict[str, object]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n```python\nx = 1\n```\nThen:\n```python\ny = 2\n```", "x = 1"),
        ("```python\nx = 1\ny = 2\nfor z in (3,\n    4", "x = 1\ny = 2"),  # cut off by the limit of tokens
        ("def f(x):\n    return (x\n\0", ""),
        ("x = 1", "x = 1"),
        ("```\nx = 1\ny = '''\n```'''", "x = 1"),
    ],
)
def test_an_answers_code_is_its_first_block(answer: str, code: str) -> None:
    assert sandbox.code_of(answer) == code


@linux_only
def test_a_problem_is_solved_if_all_tests_pass(tmp_path) -> None:
    (item,) = load_task("humaneval", written(tmp_path, HUMANEVAL), run_code=True).items
    assert item.prompt.endswith(f"problem in a markdown code block:\n```python\n{PROMPT.strip()}\n```")
    assert score_code("```python\ndef root(x):\n    return math.sqrt(x)\n```", item) == {"pass@1": 1}  # the prompt's import
    assert score_code("```python\ndef root(x):\n    return x\n```", item) == {"pass@1": 0}
    assert score_code("I cannot.", item) == {"pass@1": 0}
    rows = [MBPP, {**MBPP, "task_id": 10}, {**MBPP, "task_id": 511}]  # the others are for prompts and validation
    (item,) = load_task("mbpp", written(tmp_path, *rows), run_code=True).items
    assert item.prompt.endswith('```python\n"""\nWrite a function that doubles.\nassert double(one) == 2\n"""\n```')
    assert score_code(f"```python\n{MBPP['code']}\n```", item) == {"pass@1": 1}
    assert score_code("```python\ndef double(x):\n    return 2\n```", item) == {"pass@1": 0}


@pytest.mark.parametrize("wrong", [{"test_list": "assert double(1)"}, {"test_list": []}, {"test_list": [1]}, {"code": 3}])
def test_another_file_of_mbpp_is_refused(tmp_path, wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="is not JSON lines with MBPP's fields"):
        load_task("mbpp", written(tmp_path, {**MBPP, **wrong}), run_code=True)


@pytest.mark.parametrize("wrong", [{"test": 1}, {"prompt": None}])
def test_another_file_is_refused(tmp_path, wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="is not JSON lines with HumanEval's fields"):
        load_task("humaneval", written(tmp_path, {**HUMANEVAL, **wrong}), run_code=True)


def test_code_runs_only_if_it_may(tmp_path, monkeypatch) -> None:
    with pytest.raises(BadInput, match="can still read all files"):
        load_task("humaneval", written(tmp_path, HUMANEVAL))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BadInput, match="cannot shut in"):
        load_task("humaneval", written(tmp_path, HUMANEVAL), run_code=True)


@linux_only
def test_a_system_without_namespaces_is_refused(tmp_path, monkeypatch) -> None:
    child = Path(sandbox.__file__).with_name("shut_in.py").read_text()
    assert child.count("NEW_USERS | NEW_NETWORK") == 1
    (tmp_path / "shut_in.py").write_text(child.replace("NEW_USERS | NEW_NETWORK", "0x40 | NEW_NETWORK"))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(BadInput, match=r"cannot shut in .*no namespaces"):
        sandbox.check(allowed=True)


def raises(kind: str, statement: str) -> str:
    """A program that passes only if the statement raises this error."""
    return f"try:\n    {statement}\nexcept {kind}:\n    pass\nelse:\n    raise SystemExit(1)\n"


@linux_only
@pytest.mark.parametrize(
    "program",
    [
        "import threading\nthread = threading.Thread(target=int)\nthread.start()\nthread.join()",
        "open('own', 'w').write('x')\nassert open('/tmp/own').read() == 'x'",
        "print('noise', flush=True)",
        raises("PermissionError", "import os; os.fork()"),
        raises("OSError", "import subprocess; subprocess.run(['true'])"),
        raises("OSError", "import socket; socket.create_connection(('127.0.0.1', 22), 1)"),
        raises("OSError", "import socket; socket.getaddrinfo('example.org', 80)"),
        raises("OSError", "open(HERE + '/new', 'w')"),
        raises("OSError", "import os; os.remove(HERE + '/kept')"),
        "import os\nassert (os.getpid(), os.getppid()) == (1, 0) and os.getsid(0) == 0",  # nobody to send signals to
        raises("MemoryError", "bytearray(3 << 30)"),
        raises("PermissionError", "import socket; socket.socket(socket.AF_UNIX)"),  # a path would lead out
        "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) < 0",  # memory that no limit counts
        # What it writes to its caller has a limit, too.
        "import os\ntry:\n    while True: os.write(3, bytes(1 << 20))\nexcept OSError: pass\n"
        "os.ftruncate(3, 0)\nos.lseek(3, 0, 0)",
        "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) < 0",  # to outlive its caller
        "import ctypes\nassert ctypes.CDLL(None).prctl(15, b'own', 0, 0, 0) == 0",  # what harms nobody is allowed
        # Not even with namespaces of its own does it get the right to write back.
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10020000)\n"
        "assert libc.mount(b'none', b'/', None, 0x1020, None) < 0\n" + raises("OSError", "open(HERE + '/new', 'w')"),
    ],
)
def test_a_program_is_shut_in(program: str, tmp_path) -> None:
    here = Path(__file__).parent if tmp_path.is_relative_to("/tmp") else tmp_path  # /tmp is another one there
    (tmp_path / "kept").touch()
    assert sandbox.passes(f"HERE = {str(here)!r}\n" + program)
    assert not (here / "new").exists()


@linux_only
@pytest.mark.parametrize("program", ["assert False", "exit()", "import os; os._exit(0)", "x = (", "x = '\0'", "exit(77)"])
def test_a_program_that_ends_early_has_not_passed(program: str) -> None:
    assert not sandbox.passes(program)


@linux_only
@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_that_does_not_end_is_ended(program: str) -> None:
    started = time.monotonic()
    assert not sandbox.passes(program, seconds=1)
    assert time.monotonic() - started < 20
