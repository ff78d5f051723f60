"""The programs in examples/ run, and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models import cache_in, saved, tiny
from test_serve import serving

EXAMPLES = Path(__file__).parents[1] / "examples"


def ran(name: str, *arguments: str, **environment: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    found = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"answer.py", "ask_server.py", "compare.py", "own_prompts.py"}


@pytest.mark.real
def test_answer_shows_where_tokens_left() -> None:
    lines = ran("answer.py", "mamba-tiny", "What is the capital of France?").splitlines()
    assert all(" of 12" in line for line in lines)
    assert len(lines) > 1


@pytest.mark.real
def test_compare_finds_verified_answers_equal() -> None:
    full, verified, exits = ran("compare.py", "mamba-tiny").splitlines()
    assert full.endswith("3 of 3 answers are full depth's")
    assert verified.endswith("3 of 3 answers are full depth's")
    assert exits.startswith("exits")


def test_own_prompts_trains_and_calibrates(tmp_path) -> None:
    model = saved(tiny("llama"), tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(f"What is {number}?" for number in range(240)))
    cache = {"OFFRAMP_CACHE": str(cache_in(tmp_path / "cache"))}
    said = ran("own_prompts.py", str(model), str(tmp_path / "prompts.txt"), str(tmp_path / "exits"), "0.0005", **cache)
    assert said.startswith(f"{tmp_path / 'exits'}: ")
    assert (tmp_path / "exits" / "exits.safetensors").is_file()


def test_ask_server_prints_the_answer_with_its_drafts() -> None:
    with serving() as served:
        said = ran("ask_server.py", served.address, "Hello")
        assert "tokens a pass" in said
        answer = said.rpartition("\n")[0].rpartition("\n")[0]
        assert "[" in answer
