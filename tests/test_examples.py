"""The programs in examples/ run, and print what they promise."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from models import saved, tiny
from test_serve import serving

EXAMPLES = Path(__file__).parents[1] / "examples"


def ran(name: str, *arguments: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"answer.py", "ask_server.py", "compare.py", "own_prompts.py"}


@pytest.mark.real
def test_answer_marks_the_drafts_of_full_depths_answer() -> None:
    answer, said = ran("answer.py", "smollm2", "List three uses of vinegar in the house.").rsplit("\n", 2)[:2]
    assert "[" in answer
    assert "cleaning agent" in answer.replace("[", "").replace("]", "")
    assert said.startswith("In brackets: drafts.")


@pytest.mark.real
def test_compare_finds_exact_answers_equal() -> None:
    full, exact, early = ran("compare.py", "mamba-tiny").splitlines()
    assert full.endswith("3 of 3 answers are full depth's")
    assert exact.endswith("3 of 3 answers are full depth's")
    assert early.startswith("early")


def test_own_prompts_trains_and_calibrates(tmp_path, own_cache, monkeypatch, capsys) -> None:
    model, prompts, exits = saved(tiny("llama"), tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "exits"
    prompts.write_text("\n".join(f"What is {number}?" for number in range(240)))
    example = EXAMPLES / "own_prompts.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(model), str(prompts), str(exits), "0.0005"])
    runpy.run_path(str(example))
    assert capsys.readouterr().out.startswith(f"{exits}: ")
    assert (exits / "exits.safetensors").is_file()


def test_ask_server_prints_the_answer_with_its_drafts() -> None:
    with serving() as served:
        said = ran("ask_server.py", served.address, "Hello")
        assert "tokens a pass" in said
        answer = said.rpartition("\n")[0].rpartition("\n")[0]
        assert "[" in answer
