"""HumanEval and MBPP: code that the model writes is run with the data set's tests, shut in (`sandbox`).

The model is asked in its chat template for a whole program, in words of EvalPlus (arXiv 2305.01210), and its answer is
decoded greedily, so that pass@1 is the share of problems that are solved. Means differ from published ones, which let base
models continue the code, or allow longer answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offramp import sandbox
from offramp.evaluation.sources import from_hub, not_official, read_file
from offramp.evaluation.task import Item, Scores, Task
from offramp.files import json_of, sha256_of_text

TESTED = range(11, 511)  # MBPP's ids of the official test split
MOST_TOKENS = 256
KINDS: dict[str, Any] = {"task_id": str | int, "test_list": list}  # of fields that are not text


def python_prompt(beginning: str) -> str:
    """The request to write a Python program for what is said so."""
    asked = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
    return f"{asked}\n```python\n{beginning.strip()}\n```"


def mbpp_item(row: dict[str, Any]) -> Item:
    """A problem of MBPP: it is asked by its sentence and its first test, and all tests must pass."""
    prompt = python_prompt(f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""')
    program = "\n\n".join([sandbox.ANSWER, row["test_setup_code"], *row["test_list"], ""])
    return Item(str(row["task_id"]), row["text"], prompt, (row["code"],), program=program)


def humaneval(data: str | Path | None) -> Task:
    """HumanEval (arXiv 2107.03374): a function by its signature and docstring."""
    fields = ("task_id", "prompt", "test", "entry_point", "canonical_solution")
    rows, source, digest = _rows(data, "openai/openai_humaneval", None, "HumanEval's", fields)
    items = [
        Item(
            row["task_id"],
            row["prompt"],
            python_prompt(row["prompt"]),
            (row["prompt"] + row["canonical_solution"],),
            program=_humaneval_program(row),
        )
        for row in rows
    ]
    return Task("humaneval", items, (), MOST_TOKENS, score_code, source, digest, chat=True)


def _humaneval_program(row: dict[str, str]) -> str:
    """The prompt comes first, since tests and some answers need its imports and helpers. Its unfinished function goes."""
    name = row["entry_point"]
    return f"{row['prompt']}    pass\n\ndel {name}\n\n{sandbox.ANSWER}\n\n{row['test']}\n\ncheck({name})\n"


def mbpp(data: str | Path | None) -> Task:
    """MBPP (arXiv 2108.07732): a function by one sentence and three tests; the problems of its test split."""
    fields = ("task_id", "text", "code", "test_setup_code", "test_list")
    rows, source, digest = _rows(data, "google-research-datasets/mbpp", "full", "MBPP's", fields)
    items = [mbpp_item(row) for row in rows if row["task_id"] in TESTED]
    return Task("mbpp", items, (), MOST_TOKENS, score_code, source, digest, chat=True)


def score_code(answer: str, item: Item) -> Scores:
    """pass@1: 1 if the answer's code passes all tests, else 0."""
    return {"pass@1": float(sandbox.solves(answer, item.program))}


def _rows(
    data: str | Path | None, hub: str, config: str | None, whose: str, fields: tuple[str, ...]
) -> tuple[list[dict[str, Any]], str, str]:
    """The problems, from the hub's test split or from JSON lines with these fields; their source, and a hash."""
    if data is None:
        rows = from_hub(hub, config, "test")
        return rows, hub, sha256_of_text(json.dumps(rows))
    text, source, digest = read_file(data)
    try:
        rows = [json_of(line) for line in text.split("\n") if line.strip()]
        for row in rows:
            wrong = [name for name in fields if not isinstance(row[name], KINDS.get(name, str))]
            tests = row.get("test_list", [""])
            if wrong or not tests or not all(isinstance(test, str) for test in tests):
                raise ValueError(f"problem {row['task_id']!r}: not what is expected in {wrong or ['test_list']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_official(data, f"JSON lines with {whose} fields", error) from error
    return rows, source, digest
