"""Exits on the hub: what is pushed is what is loaded. The hub is a stand-in that serves real files to the real client."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import offramp
from helpers import exits_for, modest_exits
from models import saved, tiny
from offramp import Engine, Exits, ExitSet, Policy
from offramp.exits.format import RECORD, Record
from offramp.exits.sharing import card, on_the_hub
from offramp.files import shipped

PUSH = """
import sys, offramp
model = offramp.load(sys.argv[1], "float32").backbone
exits = offramp.ExitSet.load(sys.argv[2], model)
print(exits.push_to_hub("some/exits", licence="apache-2.0"))
"""


def ran(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_exits_go_to_the_hub_and_come_from_there(hub, tmp_path) -> None:
    model = str(saved(tiny("llama"), tmp_path / "model"))
    exits = modest_exits("llama")
    exits.policy, exits.training = Policy((0.4, 0.4, 0.4)), {"command": "offramp train …"}
    drafts = exits_for("llama", "linear", "deep")
    for each, name in ((exits, "exits"), (drafts, "exits/draft")):
        each.owner = replace(each.owner, fingerprint=tiny("llama").source.fingerprint)
        each.save(tmp_path / name)
    pushed = ran(hub, "-c", PUSH, model, str(tmp_path / "exits"))
    assert "some/exits/commit/" in pushed.stdout, pushed.stderr
    kept = sorted(str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*") if path.is_file())
    assert kept == [
        f"some/exits/{file}"
        for file in ("README.md", "draft/exits.safetensors", "draft/offramp.json", "exits.safetensors", "offramp.json")
    ]
    weights, record = "exits.safetensors", "offramp.json"
    there, here = tmp_path / "hub/some/exits", tmp_path / "exits"
    assert (there / weights).read_bytes() == (here / weights).read_bytes()
    for part in ("config", "policy", "training"):
        assert json.loads((there / record).read_text())[part] == json.loads((here / record).read_text())[part]
    main = "import sys; from offramp.cli import main; main()"
    asked = ("generate", model, "Hello", "--max-tokens", "6", "--dtype", "float32", "--mode", "early", "--exits")
    answered = ran(hub, "-c", main, *asked, "some/exits")
    backbone = offramp.load(model, "float32").backbone
    expected = Engine(backbone, Exits.load(tmp_path / "exits", backbone)).generate("Hello", max_tokens=6)
    assert answered.stdout == f"{expected.text}\n", answered.stderr
    wrong = ran(hub, "-c", main, *asked, "some/other")
    assert wrong.returncode == 1
    assert "There are no exits 'some/other'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


TESTS = ("Calibrated on 1080 prompts", "Calibrated on 864", "Calibrated on 64 prompts")  # those of exits that ship


def test_a_card_says_how_good_the_exits_are_and_links_the_model() -> None:
    exits = modest_exits("llama")
    exits.owner = replace(exits.owner, name="org/model")
    exits.training = {
        "command": "offramp train org/model -o DIR",
        "text": [{"prompts": "mine.jsonl"}],
        "tokens": {"adapters": 12345, "gates": 67, "validation": 8},
        "validation": [{"block": 2, "agreement": 0.5}, {"block": 3, "agreement": 0.625}],
    }
    exits.calibration = {
        "n": 720, "delta": 0.05, "risk": 0.1, "loss": "f1", "fill": "project",
        "tested": [
            {"passed": True, "loss": 0.031, "flops_saved": 0.166}, {"passed": False, "loss": 0.2, "flops_saved": 0.5},
        ],
    }  # fmt: skip
    text = card(exits, None, "me/exits", licence="mit")
    for part in (
        "base_model: org/model\n", "license: mit\n", "--exits me/exits", 'load("org/model", exits="me/exits")', "12,345",
        "| 3 | 62.5% | – |", "a probability of 95%", "saved 16.6% of FLOPs", "offramp train org/model -o DIR", "mine.jsonl",
    ):  # fmt: skip
        assert part in text
    assert text.startswith("---\nlibrary_name: offramp\n")
    exits.owner, exits.calibration = replace(exits.owner, name="smollm2"), {}
    text = card(exits, exits, "me/exits")
    assert "base_model" not in text
    assert "No guarantee" in text
    assert "The exit that drafts" in text
    for each, decides in exits_that_ship():
        blocks = each.split("\n\n")
        calibrated = [block for block in blocks if block.startswith(TESTS)]
        assert len(calibrated) == decides
        assert sum(block.startswith("## ") and "\n" not in block for block in blocks) == 2 + decides
        assert [block for block in blocks if block.startswith("|")] == [block for block in blocks if "|---|" in block]


def exits_that_ship() -> list[tuple[str, bool]]:
    """The cards of all exits that ship, and whether some of these exits decide."""
    cards = []
    for folder in shipped("exits"):
        groups: list[SimpleNamespace | None] = []
        for place in (folder, folder / "draft"):
            if not (place / RECORD).is_file():
                groups.append(None)
                continue
            record = Record.read(place)
            made = SimpleNamespace(**vars(record))
            made.validation = record.training["validation"]
            groups.append(made)
        cards.append((card(*groups, "org/exits", code=True), groups[0] is not None))
    return cards


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("org/name", True),
        ("org/name@v1", True),
        ("./exits", False),
        ("/exits/x", False),
        ("exits", False),
        ("a/b/c", False),
    ],
)
def test_a_hub_name_is_told_from_a_folder(name: str, there: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert on_the_hub(name) == there
    (tmp_path / "org/name").mkdir(parents=True)
    assert not on_the_hub("org/name")


def test_a_folder_is_read_as_before(tmp_path) -> None:
    exits = modest_exits("llama")
    exits.save(tmp_path)
    assert ExitSet.load(str(tmp_path), tiny("llama")).early.config == exits.config
