"""Every script in benchmarks/ runs at tiny size, on a tiny random model, and prints the figures that it promises."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import agreement
import answers
import clients
import code_prompts
import context
import gates
import guarantee
import load
import native
import offload
import offramp
import paper
import paper_size
import paper_tables
import paper_times
import picture
import prefill
import prompts
import random_model
import right
import ship
import speed
import verified
from helpers import modest_exits, sketched
from models import COMPILED, VARIANTS, compiled_only, saved, tiny
from offramp import Engine, Policy
from offramp.decode import plan
from offramp.decode.native import write
from offramp.evaluation.anatomy import anatomy
from offramp.evaluation.results import load_results
from offramp.exits.config import ExitsConfig
from offramp.exits.exits import Exits
from offramp.exits.ngrams import ngrams_of
from offramp.exits.sharing import card
from offramp.files import read_lines
from offramp.training.calibration import calibrate
from offramp.training.config import CalibrationConfig
from offramp.training.losses import Question

SMALL_MAMBA = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 1024}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model with exits that are sometimes right, questions, prompts, and a file like TriviaQA's."""
    folder = tmp_path_factory.mktemp("scripts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRAMP_CACHE", str(folder / "cache"))
        saved(tiny("llama"), folder / "model")
        fingerprint = offramp.load(str(folder / "model"), "float32").backbone.source.fingerprint
        made = modest_exits("llama", gate="ffn")
        made.owner, made.policy = replace(made.owner, fingerprint=fingerprint), Policy((0.4, 0.4, 0.4))
        made.save(folder / "exits")
        (folder / "questions.txt").write_text("".join(f"Why is it {number}?\n" for number in range(60)))
        (folder / "prompts.txt").write_text("".join(f"Say something about {number}\n" for number in range(16)))
        lines = [{"question_id": n, "question": f"Who {n}?", "answer": {"value": "Me", "aliases": []}} for n in range(10)]
        (folder / "trivia.jsonl").write_text("\n".join(map(json.dumps, lines)))
        yield folder


@pytest.fixture(autouse=True)
def here(world, tmp_path, monkeypatch):
    """Run in a folder of the test's own, where scripts write, and restore torch's threads, which they set."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRAMP_CACHE", str(world / "cache"))
    monkeypatch.setattr(speed, "NUMBERS", 1_000_000)
    yield
    torch.set_num_threads(threads)


def rows(text: str) -> list[list[str]]:
    """The cells of a printed Markdown table, without the rule below its head."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def drafts_pay(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let drafts cost nothing, since of so small a model none would pay, and save exits in `exits` that are often right."""
    monkeypatch.setattr(plan, "row_costs", lambda format: (0.0,) * 8)
    monkeypatch.setattr(plan, "asking_cost", lambda *parts: 0.0)
    made = modest_exits("llama", gate="linear")
    made.policy = Policy((1.0, 1.0, 0.0))
    made.owner = replace(made.owner, fingerprint=offramp.load(str(world / "model"), "float32").backbone.source.fingerprint)
    made.save(Path("exits"))


def test_every_script_has_a_test() -> None:
    here = Path(__file__)
    calls = {"benchmarks": (here, "{}.main("), "lm": (here.with_name("test_lm_scripts.py"), 'run("lm.{}"')}
    for folder, (tests, call) in calls.items():
        scripts = {path.stem for path in (here.parents[1] / folder).glob("*.py") if "def main(" in path.read_text()}
        untested = {script for script in scripts if call.format(script) not in tests.read_text()}
        assert scripts
        assert untested <= {"peers"}  # which speed.py starts


def test_agreement_counts_the_answers_that_are_the_librarys(world, capsys) -> None:
    agreement.main(["triviaqa", str(world / "trivia.jsonl"), "--model", str(world / "model"), "--count", "4"])
    assert capsys.readouterr().out.endswith("model, float32, triviaqa: 4 of 4 answers are the library's\n")


def test_picture_shows_what_the_demo_prints(world, tmp_path) -> None:
    path = tmp_path / "demo.svg"
    model, exits = (str(world / name) for name in ("model", "exits"))
    picture.main(["-o", str(path), "--model", model, "--exits", exits, "--max-tokens", "4", "Why?"])
    drawn = path.read_text("utf-8")
    assert "as&#160;full&#160;depth" in drawn
    assert "url(http" not in drawn  # no font from elsewhere


def test_prompts_are_divided_into_parts_that_share_none(tmp_path, capsys) -> None:
    alpaca = "Below is an instruction.\n\n### Instruction:\nDo {}.\n\n### Response:\n"
    lines = {
        "dolly": [{"prompt": alpaca.format(number)} for number in range(60)],
        "trivia": [{"question": f"Who is {number % 590}?", "answer": "Me"} for number in range(600)],
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--trivia", str(tmp_path / "trivia.jsonl"), "--instructions", str(tmp_path / "dolly.jsonl")]
    prompts.main([*arguments, "--share", "0.05", "-o", str(tmp_path / "parts")])
    files = {file.stem: file for file in (tmp_path / "parts").glob("*.jsonl")}
    parts = {name: read_lines(file, ("prompt",)) for name, file in files.items()}
    assert set(parts) == {"first", "second", "calibrate", "own-train", "own-calibrate", "own-result"}
    parts["train"] = parts.pop("first") + parts.pop("second")
    assert sum(len(set(part)) for part in parts.values()) == len(set().union(*parts.values()))
    assert len(parts["own-train"]) == 200
    assert any(line.startswith("Do ") for line in parts["train"])  # Alpaca's format is gone
    # A prompt that comes several times is answered at a different temperature each time.
    places = [place % 3 for place, line in enumerate(parts["train"]) if line == parts["train"][0]]
    assert len(places) == prompts.REPEATS
    assert set(places) == {0, 1, 2}
    assert "own-train: 200 prompts" in capsys.readouterr().out


def test_code_prompts_are_divided_into_parts_that_share_none(tmp_path, capsys) -> None:
    problems = [
        {
            "task_id": number,
            "text": f"Write function {number}.",
            "test_list": [f"assert f() == {number}"],
            "test_setup_code": "",
            "code": "",
        }
        for number in (10, 500, 510, 511, 600, 601, 974)
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, problems)))
    (tmp_path / "dolly.jsonl").write_text(json.dumps({"prompt": "### Instruction:\nName three trees.\n\n### Response:\n"}))
    arguments = ["--mbpp", str(tmp_path / "mbpp.jsonl"), "--instructions", str(tmp_path / "dolly.jsonl")]
    for folder in ("one", "two"):
        code_prompts.main([*arguments, "-o", str(tmp_path / folder)])
    names = ["code-calibrate", "code-task", "code-train"]
    assert [file.read_bytes() for file in sorted((tmp_path / "one").iterdir())] == [
        (tmp_path / "two" / f"{name}.jsonl").read_bytes() for name in names
    ]
    calibrate, task, train = (read_lines(tmp_path / "one" / f"{name}.jsonl", ("prompt",)) for name in names)
    assert len({*calibrate, *train}) == len(calibrate) + len(train)
    assert {number for number in range(1000) for line in train if f"Write function {number}." in line} == {601, 974}
    assert {number for number in range(1000) for line in calibrate if f"Write function {number}." in line} == {10, 511, 600}
    assert len(task) == 3
    assert {*task} <= {*calibrate}
    assert "Name three trees." in train
    assert sum("dedent(text)" in line for line in train + calibrate) == 2  # textwrap's: to write it, and another question
    assert f"code-train: {len(train)} prompts" in capsys.readouterr().out


def test_offload_says_what_a_token_takes(world, capsys, monkeypatch) -> None:
    names = ["full depth", "exits, `project`", "`verify`"]
    drafts_pay(world, monkeypatch)
    engines = offload.engines_of(offramp.load(str(world / "model"), "float32").backbone, world / "exits", Path("exits"))
    assert list(engines) == names
    table = rows("\n".join(offload.in_turn(engines, [[72, 105], [33]], tokens=6, pairs=2)))
    assert [row[0] for row in table[1:]] == names
    assert all(float(row[1]) > 0 for row in table[1:])
    assert table[1][2:] == ["1.00 (1.00–1.00)", "0.0", "1.00"]
    assert float(table[3][4]) > 1


def test_offload_limits_the_memory_of_a_process_or_says_that_it_cannot(world, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))  # no other process has its files in memory
    ours = ["--model", str(world / "model"), "--dtype", "float32", "--exits", str(world / "exits")]
    arguments = [*ours, "--drafts", str(world / "exits"), "--count", "1", "--tokens", "4", "--pairs", "1"]
    try:
        offload.main(arguments)
    except SystemExit:
        assert re.search(r"cannot make a memory cgroup: .+\. Run it as root, on Linux\.", capfd.readouterr().err)
    else:
        assert "MB of the process" in capfd.readouterr().out


def test_answers_compares_whole_answers_in_turns_that_are_kept(world, capsys, monkeypatch) -> None:
    # The peer is offramp itself, which stands in for others here.
    peer = speed.Entry("", "name", ("offramp", "--dtype", "float32"))
    monkeypatch.setitem(speed.ENTRIES, "peer", peer)
    arguments = [str(world / "model"), "--task", "triviaqa", "--data", str(world / "trivia.jsonl"), "--dtype", "float32"]
    arguments += ["--exits", str(world / "exits"), "--modes", "full,early", "--questions", "4"]
    for batch, turns, peers in (("1", 4, ["peer"]), ("3", 2, [])):
        asked = [*arguments, "--batch", batch, "--peers", ",".join(peers), "--out", f"{batch}.jsonl"]
        answers.main(asked)
        table = rows(capsys.readouterr().out)
        assert table[0] == ["", *answers.COLUMNS]
        assert [row[0] for row in table[1:]] == ["full", "early", *peers]
        assert table[1][-2:] == ["1.000", "1.000"]
        assert not peers or table[3][1] == "–"
        kept = Path(f"{batch}.jsonl").read_text()
        assert len(kept.splitlines()) == 1 + turns
        Path(f"{batch}.jsonl").write_text("".join(kept.splitlines(keepends=True)[:-1]))
        answers.main(asked)
        assert rows(capsys.readouterr().out)[1][1] == table[1][1], "its last turn was not made again"
    with pytest.raises(SystemExit, match="other settings"):
        answers.main([*arguments, "--batch", "2", "--out", "1.jsonl"])


@compiled_only
def test_right_compares_drafts_with_and_without_a_table_that_knows_an_answer(world, capsys) -> None:
    model = offramp.load(str(world / "model"), "float32")
    made = Exits.new(tiny("llama"), ExitsConfig((1,), "linear", "deep", 32, 32, tails=(1,), middle=2))
    made.policy = Policy((0.0,), "max-prob")
    made.owner = replace(made.owner, fingerprint=model.backbone.source.fingerprint)
    made.save(Path("plain/draft"))
    ids = model.backbone.prompts.encode("Say something about 0")
    ids += Engine(model).generate(ids, max_tokens=32).ids
    texts = [torch.tensor([*range(number), *ids]) for number in (1, 2, 3)]  # as if it answered three prompts
    made.ngrams = ngrams_of([(text[:-1], text[1:], torch.arange(len(text) - 1) > 2) for text in texts])
    made.config = replace(made.config, ngrams=len(made.ngrams.keys))
    made.save(Path("tabled/draft"))
    arguments = [str(world / "model"), "--prompts", str(world / "prompts.txt"), "--count", "4", "--dtype", "float32"]
    right.main([*arguments, "--exits", "plain", "--exits", "tabled"])
    plain, tabled = rows(capsys.readouterr().out)[1:]
    assert plain[:2] == ["plain", tabled[1]]
    assert float(tabled[2].split(",")[0]) > float(tabled[1].split(",")[0])
    with pytest.raises(SystemExit):
        right.main(arguments)  # no exits ship for this model


def test_load_compares_every_answer_with_the_same_answer_alone(world, capsys, monkeypatch) -> None:
    model = str(shutil.copytree(world / "model", "model"))
    Path("model/chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    monkeypatch.setattr(load, "PROMPTS", world / "prompts.txt")
    monkeypatch.setattr(load, "SYSTEM", "Be short.")
    load.main([model, "--clients", "4", "--requests", "21", "--dtype", "float32"])
    said = capsys.readouterr().out
    assert "21 requests" in said
    assert "'malformed': 1, 'cancelled': 2" in said or "'cancelled': 2, 'malformed': 1" in said
    assert said.rstrip().endswith("no answer was wrong, lost or mixed up")
    assert len(rows(said)[1]) == 7
    asked = load.load_of(3)
    pairs = [(each, load.Got("something else", 200, 0.1, 0.2, 3)) for each in asked]
    assert len(load.check(pairs, model, "float32")) == 3


def test_clients_are_timed_and_so_are_the_prompt_cache_and_a_stream(world, capsys, monkeypatch) -> None:
    model = str(shutil.copytree(world / "model", "model"))
    Path("model/chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    for name, value in (("PROMPT_TOKENS", 6), ("SYSTEM_TOKENS", 12), ("PAIRS", 1), ("SHORT", ("Why?",))):
        monkeypatch.setattr(clients, name, value)
    clients.main([model, "--clients", "1,2", "--requests", "1", "--tokens", "6", "--dtype", "float32"])
    said = capsys.readouterr().out
    assert [row[0] for row in rows(said)[1:]] == ["1", "2"]
    assert all(float(row[1]) > 0 and len(row) == 6 for row in rows(said)[1:])
    assert "times sooner" in said
    assert "of the engine's in this process" in said


def test_gates_compares_gates_of_one_size(world, capsys) -> None:
    arguments = [str(world / "questions.txt"), "--model", str(world / "model"), "--exits", str(world / "exits")]
    arguments += ["--own-prompts", str(world / "prompts.txt"), "--work", "work"]
    gates.main([*arguments, "--count", "6", "--tokens", "4", "--epochs", "1", "--width", "32", "--seeds", "2"])
    head, *table = rows(capsys.readouterr().out)
    assert head[3:-1] == ["block 1", "block 3", "block 5"]
    kinds = {row[0]: row for row in table}
    assert set(kinds) == {
        "mamba",
        "ffn",
        "linear",
        "mamba, memory cut",
        "mamba, never a memory",
    }
    assert kinds["mamba"][1:3] == kinds["mamba, memory cut"][1:3] != kinds["linear"][1:3]
    for row in table:
        assert all(re.fullmatch(r"[01]\.\d+ \([01]\.\d+–[01]\.\d+\)", cell) for cell in row[3:-1])


def test_the_pages_say_what_the_tables_of_the_experiment_say() -> None:
    root = Path(__file__).parents[1]
    tables = root / "docs" / "experiments" / "paper" / "tables.md"
    others = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    pages = {page: paper_tables.paragraphs(page.read_text("utf-8")) for page in (tables, *others)}
    rows_of_tables = [text for text in pages[tables] if text.startswith("|")]
    assert len(rows_of_tables) > 99
    assert not [*paper_tables.differences(rows_of_tables, pages)]


def test_context_compares_the_steps_and_memories_of_models(world, capsys) -> None:
    models = [str(world / "model"), "mamba-tiny"]
    context.main([*models, "--formats", "float32,bfloat16", "--contexts", "8,200", "--rounds", "2", "--threads", "1"])
    head, *first = rows(capsys.readouterr().out)
    assert [head, *first[:2]] != [head, *first[3:]]  # a table for each format
    assert head[1::2] == [f"{name}, ms" for name in models]
    assert [row[0] for row in first] == ["8", "200", "tokens before", "8", "200"]
    for row in first[:2]:
        assert float(row[1]) > 0
        assert re.fullmatch(r"\d+\.\d\d \(×\d+\.\d\d, \d+\.\d\d–\d+\.\d\d\)", row[3])
    # Keys and values grow with the text, Mamba states do not.
    assert float(first[1][2]) > float(first[0][2])
    assert first[1][4] == first[0][4] != "0.0"


def test_guarantee_splits_the_questions(world, capsys) -> None:
    arguments = [str(world / "questions.txt"), "--model", str(world / "model"), "--dtype", "float32"]
    arguments += ["--exits", str(world / "exits"), "--count", "60", "--tokens", "3", "--policy", "fixed", "--risk", "0.9"]
    guarantee.main([*arguments, "--delta", "0.2", "--work", "work", "--figure", "guarantee.svg"])
    out = capsys.readouterr().out
    assert [row[0] for row in rows(out)] == ["thresholds", "1 1 0", "1 0 1", "0 1 1"]
    assert "model, project: 20 splits of 60 questions; risk 0.9, delta 0.2, loss f1; float32, 3 tokens" in out
    splits = re.findall(r"^- (.+): loss (\d\.\d+) ± \d\.\d+, saved (-?\d+\.\d)%$", out, re.MULTILINE)
    assert len(splits) == 20
    above = sum(float(loss) > 0.9 for _, loss, _ in splits)
    assert f"held-out loss above the risk: {above} of 20" in out
    assert f"closed: {sum(policy == 'closed' for policy, _, _ in splits)} of 20" in out
    assert any(policy != "closed" for policy, _, _ in splits)
    assert Path("guarantee.svg").read_text().count("<svg") == 1


@pytest.fixture(scope="module")
def papered(world, tmp_path_factory) -> list[str]:
    """Arguments of a whole run of `paper.py` on a tiny model, and its results in the folder after `--work`."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "text.txt").write_text("".join(f"Some words about number {number}.\n" for number in range(600)))
    lines = [{"question_id": n, "question": f"Who {n}?", "answer": {"value": "Me", "aliases": []}} for n in range(100)]
    (folder / "trivia.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--triviaqa", str(folder / "trivia.jsonl"), "--tasks", "triviaqa", "--count", "3", "--calibration", "76"]
    arguments += ["--models", f"{world / 'model'}={world / 'exits'}", "--text", str(folder / "text.txt"), "--epochs", "1"]
    arguments += ["--own-prompts", str(world / "prompts.txt"), "--prompts", "16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRAMP_CACHE", str(world / "cache"))
        patch.setattr(paper, "WHOLE", ("triviaqa",))
        patch.setattr(paper, "CALIBRATED", ("triviaqa",))
        patch.setattr(paper, "RISKS", (0.05, 0.1))
        patch.setattr(paper, "HALVINGS", 2)
        paper.main([*arguments, "--work", str(folder / "work")])
    return [*arguments, "--work", str(folder / "work")]


def test_paper_compares_exits_that_differ_in_one_thing_and_writes_the_report(papered, monkeypatch, capsys) -> None:
    work = Path(papered[-1])
    (file,) = work.glob("*/model-triviaqa.json")
    results = load_results([file])
    assert (work / "report.html").exists()
    assert results[0].condition.name == "full depth"
    plainly = [result.condition for result in results if result.task.repetition_penalty == 1]
    jumps = {"jump, own answers", "no jump, own answers", "jump, own answers, k = 5", "no jump, plain text, k = 5"}
    calibrated = {f"early, risk {risk}, loss {loss}" for risk in (0.05, 0.1) for loss in ("f1", "task")}
    assert {each.label for each in plainly} == {"", "fills", *paper.MODES, *jumps, *calibrated}
    for label, kinds in (("jump, own answers", 4), ("no jump, own answers", 2), ("jump, own answers, k = 5", 1)):
        assert len({(each.gate, each.policy.confidence) for each in plainly if each.label == label}) == kinds
    # Thresholds lie closer and closer to that at which answers are no longer consistent; no condition is there twice.
    made = [each for each in plainly if each.label in jumps]
    assert {each.policy.thresholds[0] for each in made} in ({0.6, 0.4}, {0.6, 0.8}, {0.4, 0.6, 0.8})
    assert len({(each.label, each.name) for each in plainly}) == len(plainly)
    assert {each.fill for each in plainly} == {None, "project", "copy", "defer", "verify"}
    exact = [each for each in results if each.condition.label in ("", "exact")]
    assert all(each.summary["token_f1"].mean == 1 for each in exact)
    again = [result.condition.label for result in results if result.task.repetition_penalty == 1.1]
    assert again == ["", "exact", "early", *["jump, own answers"] * 2]
    # Other tasks have the modes, and three kinds of exits.
    monkeypatch.setattr(paper, "HALVINGS", 2)
    brief = paper.finish(paper.parser_of(paper.__doc__), [*papered[:-1], str(work / "brief")])
    made = paper.Experiment(brief.models, "triviaqa", brief).results()
    kinds = [(each.condition.label, each.condition.gate) for each in made if each.condition.label not in paper.MODES]
    papers = ("no jump, plain text, k = 5", "mamba")
    assert kinds == [("", None), ("jump, own answers", "ffn"), ("jump, own answers", "mamba"), papers]
    assert {each.task.repetition_penalty for each in made} == {1}
    # Of code that the model does not write, full depth is all.
    monkeypatch.setattr(paper, "CODE", ("triviaqa",))
    monkeypatch.setattr(paper, "LEAST", 2.0)
    assert len(paper.Experiment(brief.models, "triviaqa", brief).results()) == 1
    monkeypatch.setattr(paper, "CODE", ("mbpp",))
    with pytest.raises(SystemExit):
        paper.main([*papered, "--tasks", "triviaqa,mbpp"])
    assert "allow it with --run-code" in capsys.readouterr().err
    # A second run finds everything done.
    monkeypatch.setattr(paper.Evaluation, "run", None)
    paper.main(papered)
    assert re.search(r"report\.html, and [1-9]\d* figures$", capsys.readouterr().out, re.MULTILINE)


def test_paper_times_compares_modes_and_what_saves_most_with_full_depth_and_with_peers(
    papered, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(paper, "WHOLE", ("triviaqa",))
    monkeypatch.setattr(paper, "CALIBRATED", ("triviaqa",))
    monkeypatch.setattr(paper, "RISKS", (0.05, 0.1))
    paper_times.main([*papered, "--questions", "3", "--threads", "1", "--peers", "lookup,llamacpp-file"])
    out = capsys.readouterr().out
    ours = ["full depth", *paper.MODES, "early, calibrated here", "early, calibrated here, defer"]
    ours += ["exits trained here", "the paper's recipe"]
    alone, beside = ([row[0] for row in rows(part)[1:]] for part in out.split(", 8 side by side")[:2])
    assert alone == [*ours, "transformers-float32", "lookup", "llamacpp-file"]
    assert beside == ours
    assert "failed: needs a GGUF file, which model does not come with" in out
    files = [*Path(papered[-1]).glob("*/model-triviaqa-times-*.jsonl")]
    for file, turns in zip(sorted(files), (3, 1), strict=True):
        about, *kept = map(json.loads, file.read_text().splitlines())
        assert len(kept) == turns
        assert about["conditions"]["the paper's recipe"].startswith("no jump, plain text, k = 5: project, mamba")
        assert all(turn["exact"]["ids"] == turn["full depth"]["ids"] for turn in kept)
    paper_tables.main([*map(str, Path(papered[-1]).glob("*/model-triviaqa*.json*"))])
    head, cells = rows(capsys.readouterr().out.partition("### Peers")[2])[:2]
    assert head == ["", "exact", "transformers-float32", "lookup", "llamacpp-file"]
    assert cells[0] == "model, triviaqa: peers"
    assert cells[4] == "cannot"
    assert all(float(cell) > 0 for cell in cells[1:4])
    with pytest.raises(SystemExit):
        paper_times.main([*papered, "--peers", "lookup,vllm"])
    assert "unknown peers vllm; there are " in capsys.readouterr().err


def test_paper_tables_are_those_of_the_results_and_times(papered, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(paper, "WHOLE", ("triviaqa",))
    monkeypatch.setattr(paper, "CALIBRATED", ("triviaqa",))
    monkeypatch.setattr(paper, "RISKS", (0.05, 0.1))
    shutil.copytree(papered[-1], tmp_path / "work", ignore=shutil.ignore_patterns("*-times*"))
    paper_times.main([*papered[:-1], str(tmp_path / "work"), "--questions", "2", "--threads", "1"])
    capsys.readouterr()
    files = sorted(map(str, (tmp_path / "work").glob("*/model-triviaqa*.json*")))
    paper_tables.main([*files, "--figure", str(tmp_path / "figure.svg")])
    figure = (tmp_path / "figure.svg").read_text()
    assert figure.count("<svg") == 1
    for name in ("model", *paper.MODES, "the paper's recipe"):
        assert f"<!-- {name} -->" in figure
    page = capsys.readouterr().out
    (tmp_path / "page.md").write_text(page)
    paper_tables.main([*files, "--check", str(tmp_path / "page.md")])
    titles = re.findall("^### (.+)$", page, re.MULTILINE)
    assert titles[:5] == ["At a glance", "Modes", "Gates", "With a guarantee", "Fills"]
    assert titles[5:] == ["A repetition penalty", "One answer at a time", "Eight answers side by side"]
    glance = next(row for row in rows(page.partition("### At a glance")[2]) if row[0] == "model, triviaqa")
    assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d\); \+0\.000", glance[2])  # exact
    assert "–" not in glance
    results = load_results([Path(file) for file in files if "-times" not in file])
    defer = next(each for each in results if each.condition.fill == "defer")
    fills = next(row for row in rows(page.partition("### Fills")[2]) if row[0] == "model, triviaqa")
    saved, blocks, kept = (defer.summary[name].mean for name in ("flops_saved", "mean_blocks", "token_f1"))
    assert fills[4] == f"{paper_tables.share(saved)} ({blocks:.1f}), {paper_tables.plain(kept, 3)}"
    (folder := tmp_path / "results").mkdir()
    copy, beside, other = folder / "tables.md", folder / "README.md", tmp_path / "limits.md"
    number, line = fills[4].partition(" ")[0], f"| {' | '.join(fills)} |"
    copy.write_text(page)
    beside.write_text(f"Deferring saves {number} here, and is {glance[2].partition(' ')[0]} times as fast.\n\n{line}\n")
    other.write_text(f"It saves {number} ([results](results/README.md)).\n\n97% of it is salt.\n")
    pages = [str(copy), str(beside), str(other)]
    paper_tables.main([*files, "--check", *pages])
    copy.write_text(page.replace(line, ""))
    beside.write_text(f"{line.replace(fills[4], '99% (1.0), 1.000')}\n\nOr 96 to 97% of it.\n\n123.45 times as fast.\n")
    other.write_text("It saves 98% ([results](results/README.md)).\n")
    with pytest.raises(SystemExit) as wrong:
        paper_tables.main([*files, "--check", *pages])
    told = str(wrong.value)
    assert "tables.md lacks this row: | model, triviaqa |" in told
    assert "README.md has this row, which is not so: | model, triviaqa |" in told
    assert set(re.findall(r"says (\S+%|\S+ times)", told)) == {"96%", "97%", "98%", "99%", "123.45 times"}


@pytest.mark.parametrize(("model", "format"), [("mistral", "bfloat16"), ("codestral", "int4")])
def test_paper_size_does_everything_with_a_checkpoint_and_removes_it(model, format, capsys, monkeypatch) -> None:
    monkeypatch.setattr(paper_size, "fresh", lambda function, *arguments: function(*arguments))
    paper_size.main(["--models", model, "--formats", format, "--small", "--repetitions", "2", "--threads", "1"])
    out = capsys.readouterr().out
    assert "over one row" in out
    (result,) = json.loads(Path("build/bench/paper_size.json").read_text())["results"]
    parts = result[format]
    for loading in (parts["first"], parts["second"]):
        assert 0 < loading["peak_loaded"] <= loading["peak"]
        assert loading["allowed"] == pytest.approx(1.15 * loading["weights"] + 0.8)
    assert parts["speed"]["bytes"] > 0
    assert {rows: len(times) for rows, times in parts["speed"]["ms"].items()} == {"1": 2, "2": 2, "4": 2, "8": 2}
    assert not Path("build/bench/paper_size").exists()


def test_paper_size_goes_on_after_a_step_that_fails() -> None:
    """Each step is a process; the second one here finds the folder taken."""
    arguments = (paper_size.SHAPES["mistral"], True, Path("model"), 1)
    assert paper_size.fresh(paper_size.write, *arguments)["bytes"] > 0
    assert paper_size.fresh(paper_size.write, *arguments)["failure"].startswith("FileExistsError")


def test_a_random_checkpoint_has_every_weight_in_shards() -> None:
    config = random_model.config_of("AntonV/mamba2-130m-hf", **SMALL_MAMBA)
    size = random_model.write_random(config, Path("model"), shard=100_000)
    shards = sorted(Path("model").glob("*.safetensors"))
    assert len(shards) > 2
    assert size == pytest.approx(sum(shard.stat().st_size for shard in shards), rel=0.1)
    backbone = offramp.load("model", "float32", keep=True).backbone
    assert not backbone.stop_ids
    assert backbone.model.state_dict()["backbone.layers.0.mixer.in_proj.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert backbone.tokenizer.decode(backbone.tokenizer("é 1")["input_ids"]) == "é 1"
    with pytest.raises(FileExistsError):
        random_model.write_random(config, Path("model"))


@pytest.mark.parametrize("name", random_model.SHAPES)
def test_shapes_are_models_with_compiled_blocks(name: str) -> None:
    kinds = (
        {"layer_types": random_model.SHAPES[name]["layer_types"][1:3]} if "layer_types" in random_model.SHAPES[name] else {}
    )
    config = random_model.config_of(name, num_hidden_layers=2, vocab_size=320, **kinds)
    random_model.write_random(config, Path("model"))
    backbone = offramp.load("model", "float32").backbone
    assert backbone.runtime.engine == "compiled blocks"
    assert backbone.hidden_size == random_model.SHAPES[name]["hidden_size"]


def test_prefill_compares_in_pairs_that_take_turns(world, capsys, monkeypatch) -> None:
    small = random_model.config_of("AntonV/mamba2-130m-hf", **SMALL_MAMBA)
    monkeypatch.setattr(prefill, "config_of", lambda shape: small)
    arguments = ["--model", str(world / "model"), "--formats", "float32", "--lengths", "9,70", "--rounds", "2"]
    prefill.main([*arguments, "--prompts", "3", "--training-prompts", "4", "--tokens", "5", "--threads", "1"])
    table = [row for row in rows(capsys.readouterr().out) if row[0] != "ours"]
    pair = ["offramp-float32", "transformers-float32"]
    both = argparse.Namespace(parts=["prompts", "shapes"], formats=["float32", "int4"], model=str(world / "model"))
    both.lengths, both.shapes, both.tokens = [9, 70], ["AntonV/mamba2-130m-hf"], 5
    # llama.cpp, the peer of int4, has no file of the model.
    assert [[*trial.names] for trial in prefill.trials(both)] == [pair, pair, ["offramp-int4", "transformers-bfloat16"]]
    lengths, decoding = ["9 tokens", "70 tokens"], "decoding 5 tokens"
    assert [row[1] for row in table] == [
        *lengths,
        *lengths,
        decoding,
        "3 prompts, 5 new tokens each",
        "4 prompts, 5 tokens of answer each",
    ]
    assert [[row[0], row[3]] for row in table] == [pair] * 6 + [["offramp-bfloat16", "–"]]
    assert all(re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d–\d+\.\d\d\)", row[5]) for row in table[:6])
    for result in json.loads(Path("build/bench/prefill.json").read_text())["results"]:
        assert not result["failures"]
        assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in result["speeds"].values())


def test_peers_read_and_answer_alike(world) -> None:
    """offramp and `transformers` choose the same tokens after a prompt, and for prompts of several lengths at once."""
    folder = str(world / "model")
    prompts = [[5, 9, 70], [7] * 9, list(range(20, 36))]
    answers = []
    for name in ("offramp-float32", "transformers-float32"):
        speed.WORK.mkdir(parents=True, exist_ok=True)
        worker = speed.Worker(name, {"name": folder, "folder": folder}, 1)
        read = [worker.ask(op="prefill", ids=ids) for ids in prompts]
        batch = worker.ask(op="batch", prompts=prompts, tokens=6)
        worker.close()
        assert [answer["tokens"] for answer in read] == list(map(len, prompts))
        assert batch["tokens"] == 3 * 6
        assert [ids[:1] for ids in batch["ids"]] == [answer["ids"] for answer in read]
        answers.append(batch["ids"])
    assert answers[0] == answers[1]


def test_speed_runs_its_workers_by_turns(world, capsys) -> None:
    """The two peers that need no environment of their own; each is a process (`peers.py`)."""
    text = world / "questions.txt"
    arguments = ["--peers", "transformers-float32", "--ours", "float32", "--model", str(world / "model")]
    speed.main([*arguments, "--rounds", "2", "--tokens", "5", "--threads", "1", "--text", str(text)])
    head, *table = rows(capsys.readouterr().out)
    assert [row[0] for row in table] == ["offramp-float32", "transformers-float32"]
    assert head[-1] == "perplexity"
    record = json.loads(Path("build/bench/speed.json").read_text())
    ours, theirs = record["rows"]
    for row in (ours, theirs):
        assert row["tokens_per_second"] > 0 < row["prefill_tokens_per_second"]
        assert [len(runs) for runs in row["runs"]] == [4, 4]
        assert all(run["decode_tokens"] == 4 for runs in row["runs"] for run in runs)
    for our_round, their_round in zip(ours["runs"], theirs["runs"], strict=True):
        assert [run["ids"] for run in our_round] == [run["ids"] for run in their_round]
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)
    assert len(theirs["ratios"]["offramp-float32"]) == 2


def test_speed_says_which_peers_cannot_run(world, capsys) -> None:
    for name, words in (("llamacpp-file", "need a GGUF file"), ("magic", "unknown peers magic")):
        with pytest.raises(SystemExit):
            speed.main(["--peers", name, "--model", str(world / "model")])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_exits_ship_only_where_a_policy_that_passed_opens_one(capsys, threshold: float) -> None:
    exits, backbone = sketched("llama"), tiny("llama")
    questions = [Question(f"Question {number} about this and that") for number in range(100)]
    calibrate(backbone, exits, questions, CalibrationConfig(risk=0.5, max_tokens=4))
    policy = Policy((1.0, 1.0, threshold), candidates=30)
    exits.calibration["tested"] = [{"policy": asdict(policy), "passed": True, "loss": 0.1, "flops_saved": 0.1}]
    exits.calibration["policy"], exits.policy = asdict(policy), policy
    exits.save("built")
    ship.main(["built", "shipped"])
    shipped = Exits.load("shipped", backbone)
    kept = threshold < 1
    assert ("with its exits" in capsys.readouterr().out) == kept == bool(len(shipped))
    answers = [Engine(backbone, each, fill="project").generate("Why?", max_tokens=8).ids for each in (exits, shipped)]
    assert answers[0] == answers[1]
    assert ("none, only a sketch" in card(shipped, None, "org/name")) != kept
    assert anatomy(backbone, shipped).exits["layers"] == list(shipped.config.layers)
    calibrate(backbone, shipped, questions, CalibrationConfig(risk=0.5, max_tokens=4))  # as exits that ship may be


@pytest.mark.skipif(not COMPILED, reason="needs a C compiler")
def test_verified_compares_with_full_depth(world, capsys, monkeypatch) -> None:
    drafts_pay(world, monkeypatch)
    arguments = [str(world / "questions.txt"), "--model", str(world / "model"), "--dtype", "float32"]
    verified.main([*arguments, "--exits", "exits", "--count", "3", "--tokens", "12"])
    line = capsys.readouterr().out
    match = re.fullmatch(
        r".*model, float32: 3 answers, 0 differ; (\d+) drafts stood, (\d+) taken back \(.+\), "
        r"(\d+\.\d\d) tokens a deep pass\n",
        line,
    )
    assert match, line
    assert int(match[1]) > 0 < int(match[2])
    assert float(match[3]) > 1


def test_verified_compares_on_tiny_models_of_every_family(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["models"], "VARIANTS", VARIANTS[::6])
    verified.main(["--tiny", "--count", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == VARIANTS[::6]
    assert all(": 2 answers, 0 differ; " in line for line in lines)


@pytest.mark.real
@compiled_only
def test_native_measures_both_programs(tmp_path, capsys) -> None:
    write(offramp.load("mamba-tiny"), tmp_path)
    native.main(
        [str(tmp_path), "--model", "mamba-tiny", "--modes", "full", "--prompts", "1", "--rounds", "1", "--tokens", "4"]
    )
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| offramp")]
    assert [row[0] for row in rows] == ["offramp-run, full", "offramp generate, full"]
    small, large = ([float(number) for number in row[1:]] for row in rows)
    assert small[0] < large[0]  # memory
    assert all(number > 0 for number in small + large)
