"""Prompts to train and calibrate the exits of a model for code, in parts that share none.

    PYTHONPATH=. .venv/bin/python benchmarks/code_prompts.py --mbpp mbpp.jsonl --instructions dolly-1000.jsonl

It writes JSON lines to build/prompts: `code-train`; and what nothing is trained on: `code-calibrate`, and `code-task`,
whose problems have programs that test an answer's code. The sources are

- MBPP's training problems (ids from 601 on), each in five wordings; its validation problems (511 to 600) and the few that
  are meant as examples (up to 10) calibrate, and are those of `code-task`;
- functions of Python's own standard library, by signature and docstring, which the model is to write; one in twelve
  calibrates; and other questions about some of them, such as for unit tests;
- offramp's own prompts, for code and general ones, and instructions. Those of `calibration-prompts/` calibrate.

MBPP's test problems and HumanEval are in none of them. With `--humaneval FILE`, its prompts go to `code-bench`,
for `offramp bench --prompts`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offramp.evaluation.code import humaneval, mbpp_item, python_prompt
from offramp.files import read_lines, sha256_of_text, write_atomically
from offramp.training.data import CODING, PROMPTS
from prompts import FRESH, instructions

TRAINED, VALIDATED = range(601, 975), {*range(1, 11), *range(511, 601)}  # MBPP's official parts
FUNCTIONS, ASKED_ABOUT = 2600, 1200  # of the standard library
DOCUMENTED = range(40, 700)  # characters of a docstring
WORDINGS = (
    "{}",
    "{} Explain how your code works.",
    "Write a Python class with a method for this task, and an example of its use: {}",
)
NOT_READ = {"antigravity", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo"}  # windows and jokes


def library_functions() -> Iterator[tuple[str, str, str]]:
    """Public functions and methods of the standard library that are written in Python: name, signature, docstring."""
    warnings.simplefilter("ignore")
    for name in sorted(sys.stdlib_module_names - NOT_READ):
        try:
            module = vars(importlib.import_module(name)) if not name.startswith("_") else {}
        except ImportError:  # it belongs to another system
            continue
        owners = [module, *(vars(each) for _, each in sorted(module.items()) if inspect.isclass(each))]
        for owner in owners:
            for function in [each for _, each in sorted(owner.items()) if inspect.isfunction(each)]:
                documented = len(inspect.getdoc(function) or "") in DOCUMENTED
                if documented and function.__module__ == name and not function.__name__.startswith("_"):
                    signature = re.sub(r"0x[0-9a-f]+", "0x7f0000000000", str(inspect.signature(function)))  # addresses
                    yield function.__name__, signature, inspect.getdoc(function) or ""


def by_its_authors(row: dict[str, Any]) -> str:
    """A problem of MBPP as its authors word it (arXiv 2108.07732)."""
    asked = f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:"
    return "\n".join([asked, "", *row["test_list"]])


def by_evalplus(row: dict[str, Any]) -> str:
    """A problem of MBPP as the task `mbpp` words it."""
    return mbpp_item(row).prompt


def head_of(name: str, signature: str, doc: str) -> str:
    """The first lines of a function: its signature and its docstring."""
    indented = "\n    ".join(doc.splitlines())
    return f'def {name}{signature}:\n    """{indented}\n    """\n'


def written_out(name: str, signature: str, doc: str, way: int) -> str:
    """A request to write a function, in one of three ways."""
    head = head_of(name, signature, doc)
    if way == 0:
        return python_prompt(head)
    if way == 1:
        return f"Complete this Python function.\n\n```python\n{head}```"
    return f"Write a Python function `{name}{signature}`. {' '.join(doc.split())}"


def asked_about(name: str, signature: str, doc: str, way: int) -> str:
    """Something else to do with a function, in one of four ways."""
    wanted = (
        "Write unit tests for this Python function.",
        "Show three short examples of how to use this Python function, and explain them.",
        "Write this function in JavaScript.",
        "What could go wrong in this function, and how would you handle it? Show the code.",
    )
    return f"{wanted[way]}\n\n```python\n{head_of(name, signature, doc)}```"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbpp", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--humaneval", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/prompts"))
    args = parser.parse_args(argv)
    draw = random.Random(0)
    problems = [json.loads(line) for line in args.mbpp.read_text("utf-8").splitlines()]
    trained = [row for row in problems if row["task_id"] in TRAINED]
    functions = sorted(set(library_functions()))
    draw.shuffle(functions)
    requests = {written_out(*each, way=number % 3): each for number, each in enumerate(functions[:FUNCTIONS])}
    calibrating = [request for request in requests if int(sha256_of_text(request)[:8], 16) % 12 == 0]
    known = [each for request, each in requests.items() if request not in calibrating][:ASKED_ABOUT]
    train = [
        *(written(row) for row in trained for written in (by_its_authors, by_evalplus)),
        *(wanted.format(row["text"]) for row in trained for wanted in WORDINGS),
        *(request for request in requests if request not in calibrating),
        *(asked_about(*each, way=number % 4) for number, each in enumerate(known)),
        *(line for path in (PROMPTS, CODING) for line in read_lines(path, ("prompt",))),
        *(row["prompt"] for row in instructions(args.instructions)),
    ]
    validated = [mbpp_item(row) for row in problems if row["task_id"] in VALIDATED]
    fresh = [line for name in ("own", "instructions") for line in read_lines(FRESH / f"{name}.txt", ())]
    parts = {"code-train": train, "code-calibrate": [*(item.prompt for item in validated), *calibrating, *fresh]}
    if args.humaneval:
        parts["code-bench"] = [item.prompt for item in humaneval(args.humaneval).items]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, prompts in parts.items():
        unique = list(dict.fromkeys(prompts))
        draw.shuffle(unique)
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in unique)
        write_atomically(args.output / f"{name}.jsonl", lines.encode())
        print(f"{name}: {len(unique)} prompts")
    tested = (json.dumps({"prompt": item.prompt, "program": item.program}) + "\n" for item in validated)
    write_atomically(args.output / "code-task.jsonl", "".join(tested).encode())
    print(f"code-task: {len(validated)} prompts")


if __name__ == "__main__":
    main()
