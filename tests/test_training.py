"""Training learns, resumes to the same result, and says what is wrong with its input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from models import HIDDEN, tiny
from offramp import Engine, Policy
from offramp.errors import BadInput, CorruptFile
from offramp.exits.readouts import READOUTS
from offramp.files import read_lines
from offramp.training.config import TrainConfig
from offramp.training.teacher import Unit, harvest, load_shards, read_texts, units
from offramp.training.training import PROMPTS, _threshold, train

LAYERS = (2, 4)


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"Prompt {n} says {'abcdefgh'[n % 8] * (n % 5 + 1)}" for n in range(40)))
    return str(path)


def config(prompts: str, **kwargs) -> TrainConfig:
    settings = {"layers": LAYERS, "answer_tokens": 12, "epochs": 8, "gate_epochs": 4, "learning_rate": 1e-2}
    return TrainConfig(prompts=prompts, gate_width=16, readout_width=32, **{**settings, **kwargs})


@torch.inference_mode()
def test_harvested_states_and_teachers_are_the_full_models(tmp_path, prompts: str) -> None:
    backbone = tiny("llama")
    encoded = [backbone.prompts.encode(line) for line in read_lines(prompts, ())]
    plan = units(encoded[:10], [encoded[11]], 12, batch=4)
    sequences = load_shards(harvest(backbone, plan, LAYERS, tmp_path, lambda tokens: None))
    for ids, sequence in zip([ids for unit in plan for ids in unit.ids], sequences, strict=True):
        answered = sequence.top_ids[sequence.counted][:, 0].tolist()
        is_text = sequence.counted.all()
        whole = list(ids) if is_text else list(ids) + answered[:-1]
        h, step = backbone.embed(torch.tensor([whole]))
        state = backbone.state()
        for index, (start, stop) in enumerate([(0, 2), (2, 4)]):
            h = backbone.run(h, start, stop, state, step)
            torch.testing.assert_close(sequence.hidden[:, index].float(), h[0], rtol=2e-3, atol=2e-3)
        logp = backbone.logits(backbone.run(h, 4, 6, state, step))[0].log_softmax(-1)
        assert torch.equal(sequence.top_ids[sequence.counted][:, 0].long(), logp.argmax(-1)[sequence.counted])
        best = logp.gather(-1, sequence.top_ids.long())[sequence.counted]
        torch.testing.assert_close(sequence.top_logp[sequence.counted].float(), best, rtol=2e-3, atol=1e-2)


def test_units_hold_prompts_of_one_length() -> None:
    plan = units([[1] * n for n in (3, 5, 3, 3, 5)], [[1, 2]], 4, batch=2)
    assert plan == [
        Unit(((1, 1, 1), (1, 1, 1)), 4),
        Unit(((1, 1, 1),), 4),
        Unit(((1,) * 5, (1,) * 5), 4),
        Unit(((1, 2),), 0),
    ]


def test_training_lowers_the_loss_and_keeps_its_record(tmp_path, prompts: str) -> None:
    exits = train(tiny("llama"), tmp_path / "exits", config(prompts), command="offramp train tiny")
    curve = [entry for entry in exits.training["curve"] if entry["stage"] == "adapters"]
    assert sum(curve[-1]["loss"]) < sum(curve[0]["loss"])
    assert exits.training["command"] == "offramp train tiny"
    assert [row["block"] for row in exits.training["validation"]] == list(LAYERS)
    assert exits.training["text"][0]["lines"] == 40
    assert sorted(path.name for path in (tmp_path / "exits").iterdir()) == ["exits.safetensors", "offramp.json"]
    record = json.loads((tmp_path / "exits" / "offramp.json").read_text())
    assert (record["weight_format"], record["backbone"]["hidden_size"]) == ("float32", HIDDEN)


@pytest.mark.parametrize("gate", ["linear", "ffn", "mamba"])
@pytest.mark.parametrize("readout", READOUTS)
def test_every_kind_trains(tmp_path, prompts: str, gate: str, readout: str) -> None:
    train(tiny("gpt2"), tmp_path / "exits", config(prompts, gate=gate, readout=readout, epochs=1, gate_epochs=1))


def test_a_deep_read_out_learns_to_draft_over_its_short_list(tmp_path, prompts: str) -> None:
    """Verified with it, the tiny model gives its own answers, in fewer passes to the top than tokens."""
    backbone = tiny("llama")
    settings = config(
        prompts, layers=(2,), gate="linear", readout="deep", shortlist=100, confidence="max-prob", threshold=0.2
    )
    exits = train(backbone, tmp_path / "exits", settings)
    assert exits.policy == Policy((0.2,), "max-prob")
    assert len(exits.shortlist) == 100
    full, drafting = Engine(backbone), Engine(backbone, exits, fill="verify", lookup=0)
    answers = [drafting.generate(line, max_tokens=12) for line in read_lines(prompts, ())[:8]]
    assert [answer.ids for answer in answers] == [
        full.generate(line, max_tokens=12).ids for line in read_lines(prompts, ())[:8]
    ]
    assert sum(answer.tokens_per_deep_pass for answer in answers) > 8
    drafts = {token.id for answer in answers for token in answer.tokens if token.exit_block == 2}
    assert drafts <= set(exits.shortlist.tolist())


class Interrupt:
    """Progress that presses Ctrl-C at the n-th report of a stage."""

    def __init__(self, stage: str, at: int) -> None:
        self.stage, self.left = stage, at

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        self.left -= stage == self.stage
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "at"), [("reading", 2), ("adapters", 5), ("labels", 3), ("gates", 2)])
def test_ctrl_c_and_resume_give_the_result_of_an_uninterrupted_run(
    tmp_path, prompts: str, monkeypatch, stage: str, at: int
) -> None:
    clock = iter(range(0, 10**6, 50))  # every step is late enough for a checkpoint
    monkeypatch.setattr("offramp.training.training.time.monotonic", lambda: next(clock))
    settings = config(prompts, epochs=2)
    straight = train(tiny("llama"), tmp_path / "straight", settings)
    with pytest.raises(KeyboardInterrupt):
        train(tiny("llama"), tmp_path / "broken", settings, Interrupt(stage, at))
    assert not (tmp_path / "broken" / "offramp.json").exists()
    resumed = train(tiny("llama"), tmp_path / "broken", settings)
    for key, value in straight.modules.state_dict().items():
        assert torch.equal(value, resumed.modules.state_dict()[key]), key
    assert straight.training["curve"] == resumed.training["curve"]
    assert straight.policy == resumed.policy


def test_an_unfinished_training_is_not_mixed_with_another(tmp_path, prompts: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny("llama"), tmp_path, config(prompts), Interrupt("adapters", 3))
    with pytest.raises(BadInput, match="other settings"):
        train(tiny("llama"), tmp_path, config(prompts, seed=1))


def test_damaged_work_files_are_named(tmp_path, prompts: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny("llama"), tmp_path, config(prompts), Interrupt("labels", 1))
    (tmp_path / ".training" / "adapters.pt").write_bytes(b"PK")
    with pytest.raises(CorruptFile, match="checkpoint"):
        train(tiny("llama"), tmp_path, config(prompts))
    shard = sorted((tmp_path / ".training").glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CorruptFile, match="shard"):
        train(tiny("llama"), tmp_path, config(prompts))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl", '{"prompt": "x"}\n{"other": 1}', "line 2"),
        ("a.jsonl", "not json", "line 1"),
        ("a.txt", None, "cannot be read"),
        ("a.txt", "one\ntwo", "too few"),
    ],
)
def test_unusable_prompt_files_are_named(tmp_path, name: str, content, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=words) as raised:
        train(tiny("llama"), tmp_path / "exits", config(str(path)))
    assert raised.value.hint


def test_plain_text_and_json_lines_are_read_in_pieces(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("x" * 600)
    (tmp_path / "b.jsonl").write_text('{"text": "hello"}\n{"text": "world!"}\n')
    assert [len(piece) for piece in read_texts(tmp_path / "a.txt", tiny("llama"))] == [256, 256, 88]
    assert [len(piece) for piece in read_texts(tmp_path / "b.jsonl", tiny("llama"))] == [5, 6]


def test_a_threshold_is_the_lowest_that_keeps_the_precision() -> None:
    confidence = torch.linspace(0, 1, 1001)
    agrees = confidence > 0.4
    threshold = _threshold(confidence, agrees, precision=0.9)
    assert agrees[confidence > threshold].float().mean() >= 0.9
    assert agrees[confidence > threshold - 0.0011].float().mean() < 0.9  # the tokens are 0.001 apart
    assert _threshold(confidence, torch.zeros(1001, dtype=torch.bool), 0.9) == 1.0


DATA = Path(__file__).parents[2] / "shared" / "data"


def plain(text: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()


def test_the_prompt_list_is_small_and_has_no_repeats() -> None:
    lines = PROMPTS.read_text().splitlines()
    assert len(lines) == len({plain(line) for line in lines}) > 1000
    assert PROMPTS.stat().st_size <= 200_000


@pytest.mark.skipif(not DATA.exists(), reason="the evaluation files are not here")
def test_no_evaluation_question_is_among_the_training_prompts() -> None:
    questions = set()
    with (DATA / "truthfulqa" / "TruthfulQA.csv").open() as stream:
        questions |= {plain(row["Question"]) for row in csv.DictReader(stream)}
    for line in (DATA / "triviaqa" / "rc.nocontext.jsonl").read_text().strip().split("\n"):
        questions.add(plain(json.loads(line)["question"]))
    for name in ("coqa.json", "coqa-multi-reference.json"):
        for conversation in json.loads((DATA / "coqa" / name).read_text())["data"]:
            for question in conversation["questions"]:
                questions.add(plain(question["input_text"] if isinstance(question, dict) else question))
    assert len(questions) > 2500
    for line in PROMPTS.read_text().splitlines():
        bare = re.sub(r"^(question|q) | (answer|a)$", "", plain(line))
        assert bare not in questions, line
