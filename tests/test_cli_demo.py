"""The demo: where each token came from, how fast it was, and what each mode did."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import offramp
from helpers import modest_exits, run_cli
from models import saved, tiny
from offramp import Engine, Policy
from offramp.cli import terminal
from offramp.cli.demo import QUESTIONS, _questions_for
from offramp.decode.modes import MODES
from offramp.exits.format import RECORD, Record
from offramp.exits.learned import TRAINED, known_among
from offramp.files import shipped

COLUMNS = ("tokens/s", "times as fast", "tokens a pass", "FLOPs saved", "consistency")
SPEED = re.compile(r"→ \d+\.\d times as fast as full depth, same tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, exits for it, and exits that learned from other weights."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRAMP_CACHE", str(folder / "cache"))
        saved(tiny("llama"), folder / "model")
        backbone = offramp.load(str(folder / "model")).backbone
        exits = modest_exits("llama")
        exits.policy = Policy((0.5,) * 3)
        for name, fingerprint in (("exits", backbone.source.fingerprint), ("other", "0")):
            exits.owner = replace(exits.owner, fingerprint=fingerprint)
            exits.save(folder / name)
        yield folder


def demo(folder: Path, *arguments: str, exits: str = "exits") -> str:
    ran = run_cli("demo", "--model", "model", "--exits", exits, "--max-tokens", "6", *arguments, folder=folder)
    assert ran.code == 0, ran.stderr
    return ran.stdout


def rows(shown: str) -> dict[str, list[str]]:
    """The cells of the table, by mode."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    return {mode: rest for mode, *rest in cells}


def test_the_demo_answers_the_users_own_questions_and_says_how_fast_and_whether_the_tokens_are_the_same(folder) -> None:
    shown = demo(folder, "Why [x]?", "How?")
    assert "Why [x]?" in shown
    assert "How?" in shown
    assert len(SPEED.findall(shown)) == 2


def test_the_demo_explains_the_colours_in_its_first_line(folder) -> None:
    first = demo(folder, "Why?").splitlines()[0]
    assert all(name in first for _, _, name in terminal.SOURCES.values())


def test_a_row_of_the_table_has_only_what_says_something_about_its_mode(folder) -> None:
    shown = demo(folder, "Why?")
    table = rows(shown)
    assert [*table] == [*MODES]
    assert all(column in shown for column in COLUMNS)
    assert table["full"][1:] == ["–", "1.00", "–", "–"]
    assert table["exact"][3:] == ["–", "1.00"]
    assert table["early"][2] == "–"
    assert table["early"][3].endswith("%")


def test_exits_that_learned_from_other_weights_have_no_row_for_early(folder) -> None:
    assert [*rows(demo(folder, "Why?", exits="other"))] == ["full", "exact"]


def test_the_demo_has_three_questions_of_its_own_for_each_model(folder) -> None:
    assert {len(questions) for questions in QUESTIONS.values()} == {3}
    assert len(SPEED.findall(demo(folder))) == 3


def test_a_model_for_code_is_asked_for_code() -> None:
    assert _questions_for("models/Some-Coder-0.5B.gguf") == QUESTIONS["code"]
    assert _questions_for("org/other") == QUESTIONS["smollm2"]


def test_no_exit_that_ships_learned_from_a_question_of_the_demo() -> None:
    asked = [question for questions in QUESTIONS.values() for question in questions]
    records = [Record.read(folder) for folder in shipped("exits") if (folder / RECORD).is_file()]
    assert records
    assert not any(known_among(asked, record.training[TRAINED]) for record in records)


def test_a_token_has_the_colour_of_what_it_came_from(monkeypatch) -> None:
    console = Console(force_terminal=True, color_system="standard", width=200, highlight=False)
    monkeypatch.setattr(terminal, "console", console)
    token = Engine(tiny("llama")).generate("Some words", max_tokens=1).tokens[0]
    codes = {source: terminal.shade(replace(token, text="a", source=source)) for source in terminal.SOURCES}
    assert len({*codes.values()}) == len(codes)
    assert codes["exit"] == "\x1b[32ma\x1b[0m"


def test_only_the_name_before_a_coloured_answer_is_dim(monkeypatch) -> None:
    console = Console(force_terminal=True, color_system="standard", width=200, highlight=False)
    monkeypatch.setattr(terminal, "console", console)
    exits = modest_exits("llama")
    answer = Engine(tiny("llama"), exits, Policy((0.0,) * 3)).generate("Some words", max_tokens=4)
    with console.capture() as captured:
        terminal.answer_in_colour("Some words", answer, answer)
    line = next(line for line in captured.get().splitlines() if "early  " in line)
    label, _, tokens = line.partition("early  ")
    assert "\x1b[2m" in label
    assert "\x1b[32m" in tokens
    assert "\x1b[2" not in tokens.replace("\x1b[0m", "")


def test_the_picture_of_the_readme_shows_what_the_demo_prints_today() -> None:
    shown = html.unescape((Path(__file__).parents[1] / "docs" / "demo.svg").read_text("utf-8"))
    words = " ".join(re.sub(r"<[^>]*>", " ", shown).replace("\N{NO-BREAK SPACE}", " ").split())
    assert all(text in words for text in (*COLUMNS, *MODES, *QUESTIONS["smollm2"]))
    assert all(name in words for _, _, name in terminal.SOURCES.values())
    assert len(SPEED.findall(words)) == 3
