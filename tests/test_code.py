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
        ("x = 1\nfor y in x:\n    if y:\n        z = {\n            1: 2,", "x = 1"),
        ("```python", "```python"[:0]),
        ("```\nx = 1\ny = '''\n```'''", "x = 1"),
    ],
)
def test_an_answers_code_is_its_first_block(answer: str, code: str) -> None:
    assert sandbox.code_of(answer) == code


@pytest.mark.parametrize("hostile", ["`" * 10**6, "```" * 10**5, "@a\n" * 10**4, "x = 1\n" * 10**5 + "(", "-" * 10**5])
def test_code_is_found_in_linear_time(hostile: str) -> None:
    started = time.process_time()
    sandbox.code_of(hostile)
    assert time.process_time() - started < 20


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
    with pytest.raises(BadInput, match="Each runs shut in"):
        load_task("humaneval", written(tmp_path, HUMANEVAL))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BadInput, match="cannot shut in"):
        load_task("humaneval", written(tmp_path, HUMANEVAL), run_code=True)
