"""Exits on the hub: what is pushed is what is loaded. The hub is a stand-in that serves real files to the real client."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import offramp
from helpers import exits_for, modest_exits
from models import saved, tiny
from offramp import Engine, Exits, Policy
from offramp.exits.sharing import card, on_the_hub

PUSH = """
import sys, offramp
model = offramp.load(sys.argv[1], "float32")
exits, drafts = offramp.Exits.load(sys.argv[2], model), offramp.Exits.load(sys.argv[3], model)
print(exits.push_to_hub("some/exits", drafts, licence="apache-2.0"))
"""


def ran(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_exits_go_to_the_hub_and_come_from_there(hub, tmp_path) -> None:
    model = str(saved(tiny("llama"), tmp_path / "model"))
    exits = modest_exits("llama")
    exits.policy, exits.training = Policy((0.4, 0.4, 0.4)), {"command": "offramp train …"}
    drafts = exits_for("llama", "linear", "deep")
    for each, name in ((exits, "exits"), (drafts, "drafts")):
        each.backbone["fingerprint"] = tiny("llama").source.fingerprint
        each.save(tmp_path / name)
    pushed = ran(hub, "-c", PUSH, model, str(tmp_path / "exits"), str(tmp_path / "drafts"))
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
    asked = ("generate", model, "Hello", "--max-tokens", "6", "--dtype", "float32", "--exits")
    answered = ran(hub, "-c", main, *asked, "some/exits")
    backbone = offramp.load(model, "float32")
    expected = Engine(backbone, Exits.load(tmp_path / "exits", backbone)).generate("Hello", max_tokens=6)
    assert answered.stdout == f"{expected.text}\n", answered.stderr
    wrong = ran(hub, "-c", main, *asked, "some/other")
    assert wrong.returncode == 1
    assert "There are no exits 'some/other'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_card_says_how_good_the_exits_are_and_links_the_model() -> None:
    exits = modest_exits("llama")
    exits.backbone["name"] = "org/model"
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
    text = card(exits, "me/exits", licence="mit")
    for part in (
        "base_model: org/model\n", "license: mit\n", "--exits me/exits", 'from_pretrained("me/exits", model)', "12,345",
        "| 3 | 62.5% | – |", "a probability of 95%", "saved 16.6% of FLOPs", "offramp train org/model -o DIR", "mine.jsonl",
    ):  # fmt: skip
        assert part in text
    assert text.startswith("---\nlibrary_name: offramp\n")
    exits.backbone["name"], exits.calibration = "smollm2", {}
    text = card(exits, "me/exits", exits)
    assert "base_model" not in text
    assert "No guarantee" in text
    assert "Exits that draft" in text


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
    assert Exits.from_pretrained(tmp_path, tiny("llama")).config == exits.config
