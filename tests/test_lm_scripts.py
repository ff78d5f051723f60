"""The scripts in lm/ run one after another at tiny size, from text to a model that is measured, as in `make mamba-lm`."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from models import saved, tiny

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The scripts set torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(script: str, *arguments: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(shutil, "which", lambda name: None)  # without a compiler: it would take longer than everything else
        importlib.import_module(script).main()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder, dice = tmp_path_factory.mktemp("lm"), random.Random(0)
    words = ["".join(dice.choices("abcdefghijklmnop", k=dice.randint(2, 7))) for _ in range(150)]
    paragraphs = [" ".join(dice.choices(words, k=60)).capitalize() + "." for _ in range(400)]
    (folder / "book.txt").write_text("\n\n".join(paragraphs))
    lines = [{"question": f"{' '.join(dice.choices(words, k=7))}?", "answer": dice.choice(words)} for _ in range(300)]
    (folder / "trivia.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "asked.jsonl").write_text(json.dumps({"question": lines[0]["question"]}))
    files = ("--text", folder / "book.txt", folder / "trivia.jsonl", "--exclude", folder / "asked.jsonl")
    run("lm.corpus", "-o", folder / "corpus", *files, "--vocabulary", "320")
    return folder / "corpus"


@pytest.fixture(scope="module")
def model(corpus: Path) -> Path:
    shape = ("--blocks", "12", "--width", "32", "--state", "16", "--batch", "2", "--length", "64")
    run("lm.train", corpus, "-o", corpus.parent / "model", "--steps", "2", *shape, "--threads", "1")
    return corpus.parent / "model"


def test_the_corpus_drops_what_is_asked_in_evaluations(corpus: Path) -> None:
    record = json.loads((corpus / "corpus.json").read_text())
    assert sum(sum(source["dropped"].values()) for source in record["sources"]) == 1
    assert min(split["tokens"] for split in record["splits"].values()) > 0


def test_train_says_how_well_the_model_does(corpus: Path, model: Path, capsys) -> None:
    shorter = ("--batch", "2", "--length", "64", "--threads", "1")
    run("lm.train", corpus, "-o", model.with_name("second"), "--steps", "1", *shorter, "--start", model)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{model.with_name('second')}: ")
    bits = json.loads((model.with_name("second") / "training.json").read_text())["validation"]["valid_bits_per_byte"]
    assert f"{bits} bits per byte" in line
    assert bits > 0


def test_average_makes_a_model_between_two(corpus: Path, model: Path) -> None:
    from safetensors.torch import load_file

    shorter = ("--batch", "2", "--length", "64", "--threads", "1")
    run("lm.train", corpus, "-o", model.with_name("next"), "--steps", "4", *shorter, "--start", model)
    run("lm.average", model, model.with_name("next"), "-o", model.with_name("mean"))
    first, second, mean = (load_file(model.with_name(name) / "model.safetensors") for name in ("model", "next", "mean"))
    assert any(not torch.equal(first[key], second[key]) for key in first)
    for key in first:
        between = (first[key].float() + second[key].float()) / 2
        torch.testing.assert_close(mean[key].float(), between, rtol=1e-2, atol=1e-3)


def test_baselines_are_counted_in_bits_per_byte(corpus: Path, capsys) -> None:
    run("lm.baselines", corpus)
    result = json.loads(capsys.readouterr().out)
    assert result["test_bytes"] > 0 < result["test_tokens"]
    assert 0 < result["kneser_ney_5"] < 8
    assert 0 < result["xz_9e"] < 8


def test_evaluate_measures_bits_per_byte_and_writes_samples(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    evaluate = importlib.import_module("lm.evaluate")
    monkeypatch.setattr(evaluate, "samples", partial(evaluate.samples, count=4, most=12))
    files = ("-o", tmp_path / "numbers.json", "--samples", tmp_path / "samples.md")
    run("lm.evaluate", model, corpus, "--threads", "1", *files)
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    assert 0 < result["bits_per_byte"] < 20
    assert (tmp_path / "samples.md").read_text().startswith("# ")


def test_answers_are_written_once_for_each_question(tmp_path: Path, own_cache: Path, capsys) -> None:
    saved(tiny("llama"), tmp_path / "model")
    lines = [json.dumps({"question": f"What is {n}?", "answer": "A number."}) for n in range(5)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    command = (tmp_path / "model", tmp_path / "questions.jsonl", "-o", tmp_path / "answers.jsonl", "--tokens", "4")
    for count in (3, 5):  # the second run goes on
        run("lm.answers", *command, "--count", str(count), "--threads", "1")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["3", "5"]
    questions = [json.loads(line)["question"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(questions) == [f"What is {n}?" for n in range(5)]
