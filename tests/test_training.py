"""Training learns, resumes to the same result, and says what is wrong with its input."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import transformers
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers import costing, damaged, same_or_tied, some_prompts
from models import COMPILED, HIDDEN, tiny
from offramp import Engine, Policy
from offramp.errors import BadInput, BadNumbers, CorruptFile
from offramp.exits.config import ExitsConfig
from offramp.exits.exits import Exits
from offramp.exits.learned import hashes_of
from offramp.exits.ngrams import prompt_of
from offramp.exits.readouts import READOUTS
from offramp.files import read_lines
from offramp.model.backbone import Backbone
from offramp.model.hub import Source
from offramp.training import answering
from offramp.training.answering import write_shards
from offramp.training.config import TrainConfig
from offramp.training.data import PROMPTS, lines_of, parts_of, turns
from offramp.training.distillation import Distillation
from offramp.training.loop import Budget, Fit, accelerator_for, batches
from offramp.training.planning import DECIDING, TRYING
from offramp.training.sketch import sketch_of
from offramp.training.teacher import TeacherText, TeacherTexts, TextGroup, group_texts, read_texts
from offramp.training.trainer import MISSED, Trainer, gate_targets, needed_layers
from offramp.training.training import train
from offramp.training.validation import LabelledTexts, Labels, evidence, lowest

LAYERS = (2, 4)
ANSWERING = ["llama", "bamba", *(["llama/compiled", "mamba2/compiled"] if COMPILED else [])]


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"Prompt {n} says {'abcdefgh'[n % 8] * (n % 5 + 1)}" for n in range(40)))
    return str(path)


def config(prompts: str, **kwargs) -> TrainConfig:
    settings = {
        "layers": LAYERS,
        "answer_tokens": 12,
        "temperatures": (0.0,),
        "batch": 8,
        "epochs": 8,
        "gate_epochs": 4,
        "learning_rate": 1e-2,
    }
    return TrainConfig(prompts=prompts, gate_width=16, readout_width=32, **{**settings, **kwargs})


@pytest.mark.parametrize("family", ANSWERING)
@torch.inference_mode()
def test_stored_states_and_teachers_are_the_full_models(tmp_path, prompts: str, family: str) -> None:
    backbone = tiny(family)
    encoded = [backbone.prompts.encode(line) for line in read_lines(prompts, ())]
    groups = group_texts(encoded[:10], [encoded[11]], 12, batch=4)
    texts = TeacherTexts.open(write_shards(backbone, groups, LAYERS, tmp_path))
    for ids, text in zip([ids for group in groups for ids in group.ids], texts, strict=True):
        answered = text.top_ids[text.counted][:, 0].tolist()
        is_text = text.counted.all()
        whole = list(ids) if is_text else list(ids) + answered[:-1]
        h, step = backbone.embed(torch.tensor([whole]))
        state = backbone.state()
        for index, (start, stop) in enumerate([(0, 2), (2, 4)]):
            h = backbone.run(h, start, stop, state, step)
            if "compiled" in family:  # bit for bit, though the texts share their beginning and are read together
                assert torch.equal(text.hidden[:, index], h[0].bfloat16())
            torch.testing.assert_close(text.hidden[:, index].float(), h[0], rtol=2**-8, atol=2e-3)
        logp = backbone.logits(backbone.run(h, 4, 6, state, step))[0].log_softmax(-1)
        assert torch.equal(text.top_ids[text.counted][:, 0].long(), logp.argmax(-1)[text.counted])
        best = logp.gather(-1, text.top_ids.long())[text.counted]
        torch.testing.assert_close(text.top_logp[text.counted].float(), best, rtol=2e-3, atol=1e-2)


def test_groups_hold_prompts_of_one_length() -> None:
    groups = group_texts([[1] * n for n in (3, 5, 3, 3, 5)], [[1, 2]], 4, batch=2)
    assert groups == [
        TextGroup(((1, 1, 1), (1, 1, 1)), 4),
        TextGroup(((1, 1, 1),), 4),
        TextGroup(((1,) * 5, (1,) * 5), 4),
        TextGroup(((1, 2),), 0),
    ]


@pytest.mark.parametrize("only", ["", "adapters", "gates"])
def test_what_is_held_out_answers_no_prompt_that_was_learned_from(only: str, tmp_path: Path) -> None:
    prompts = [[7, *ids] for ids in some_prompts(30, seed=5)]
    groups = group_texts(prompts * 4, [[1, 2, 3], [1, 2, 4]], 5, batch=8, temperatures=[0.0, 0.7] * 60)
    texts = TeacherTexts.open(write_shards(tiny("llama"), groups, LAYERS, tmp_path))
    parts = parts_of(texts, 0, only)
    assert sum(map(len, parts)) == len(texts) == 122
    asked = [{prompt_of(text.ids.numpy(), text.counted.numpy()) for text in part} - {b""} for part in parts]
    assert all(asked) or only
    assert sum(map(len, asked)) == len(set().union(*asked)) == 30
    assert len(parts[2]) in range(12, 17)
    assert len(parts[{"adapters": 1, "gates": 0}.get(only, 1)]) in (range(1, 5) if only else range(24, 29))


@pytest.mark.parametrize("beginning", [[], [7, 8, 9]])
@pytest.mark.parametrize("family", ANSWERING)
def test_own_answers_are_full_depths_however_many_stand_side_by_side(
    family: str, beginning: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny(family)
    prompts = [beginning + ids for ids in some_prompts(11, seed=3)]
    engine = Engine(backbone)
    free = [engine.generate(prompt, max_tokens=9).ids for prompt in prompts]
    # Tokens that end some of the answers early, so that other prompts take their places.
    ends = frozenset({257, free[0][2], free[4][5]})
    monkeypatch.setattr(Backbone, "stop_ids", ends)
    wanted = {tuple(prompt): engine.generate(prompt, max_tokens=9, end_ids=ends).ids for prompt in prompts}
    assert len({len(ids) for ids in wanted.values()}) > 1
    kept = []
    for rows in (1, 3, 64):
        monkeypatch.setattr(answering, "SIDE_BY_SIDE", rows)
        folder = tmp_path / str(rows)
        groups = group_texts(prompts, [], 9, batch=4)
        texts = TeacherTexts.open(write_shards(backbone, groups, LAYERS, folder))
        for ids, text in zip([ids for group in groups for ids in group.ids], texts, strict=True):
            answer = text.top_ids[text.counted][:, 0].tolist()
            assert same_or_tied(family, list(ids), answer, wanted[ids])
            assert text.ids.tolist() == [*ids, *wanted[ids][:-1]]
            assert len(text.hidden) == len(text.ids)
        kept.append([path.read_bytes() for path in sorted(folder.iterdir())])
    if "compiled" in family:  # bit for bit
        assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("family", sorted({"gemma2", "gpt2", "mamba", "mamba2", "jamba", *ANSWERING}))
def test_own_answers_are_those_of_the_engine(family: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn ones, greedy ones and texts to read beside each other, whatever settings the model brings but end tokens."""
    backbone, ends = tiny(family), [257, *range(5, 250, 11)]
    brought = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.1,
        repetition_penalty=9.0,
        min_new_tokens=8,
        suppress_tokens=[*range(90)],
        eos_token_id=ends,
    )
    monkeypatch.setattr(backbone.model, "generation_config", brought)
    prompts, read = [[65 + place] * 4 for place in range(12)], [[70, 71, 72], [80] * 9]
    groups = group_texts(prompts, read, 9, 6, [0.0, 0.7, 3.0] * 4)
    made = [text.ids.tolist() for text in TeacherTexts.open(write_shards(backbone, groups, LAYERS, tmp_path))]
    choose = [group.choose(place) for group in groups[:2] for place in range(6)]
    answers = dict(Engine(backbone).answers(prompts, 1, choose, max_tokens=9))
    assert len({len(text) for text in made}) > 3
    for place, text in enumerate(made[:12]):
        assert text == [*prompts[place], *answers[place].ids[:-1]]
    assert made[12:] == read


@settings(deadline=None, max_examples=30)
@given(width=st.sampled_from([100, 1024, 1088, 2048]), count=st.integers(1, 16), seed=st.integers(0, 99))
def test_the_most_probable_tokens_are_found_in_order(width: int, count: int, seed: int) -> None:
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(answering._largest(logits, count), logits.topk(count, dim=-1).indices)


def test_the_loss_asks_for_the_teachers_tokens_as_often_or_for_any_that_will_do() -> None:
    """At the first position, the teacher gives chances to the tokens 0, 1, 2 and 3; at the second to 4, 5, 6 and 7."""
    chances = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.7, 0.1, 0.1, 0.1]])
    ids = torch.arange(8, dtype=torch.int32).unflatten(0, (2, 4))
    text = TeacherText(torch.zeros(2), torch.zeros(2, 1, 1), ids, chances.log().clamp(min=-50).half(), torch.ones(2).bool())
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    logp, generator = logits.log_softmax(-1), torch.Generator()
    cross = -(chances[0] * logp[0, :4]).sum() - (chances[1] * logp[1, 4:8]).sum()
    plain = Distillation.of([text], 10, generator, torch.device("cpu"))
    assert float(plain.loss(logits)) == pytest.approx(float(cross) / 2, abs=1e-3)
    near = Distillation.of([text], 10, generator, torch.device("cpu"), near=0.5)
    any_of = -logp[0, :2].logsumexp(-1) - logp[1, 4]
    assert float(near.loss(logits)) == pytest.approx(float(any_of) / 2, abs=1e-4)
    assert float(near.loss(logits[1:], torch.tensor([False, True]))) == pytest.approx(float(-logp[1, 4]), abs=1e-4)
    listed = Distillation.of([text], 10, generator, torch.device("cpu"), torch.tensor([1, 2, 3, 9]), near=0.5)
    some = logits[:, [1, 2, 3, 9]].log_softmax(-1)
    assert float(listed.loss(logits[:, [1, 2, 3, 9]])) == pytest.approx(float(-some[0, 0]) / 2, abs=1e-4)


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


@pytest.mark.skipif("llama" not in COMPILED, reason="needs a C compiler")
def test_a_deep_read_out_learns_to_draft_over_its_short_list(tmp_path, prompts: str) -> None:
    """With the draft exit and `verify`, the tiny model gives its own answers, with fewer deep passes than tokens."""
    alike = tiny("llama")
    backbone = Backbone(copy.deepcopy(alike.model), alike.tokenizer, alike.source)
    settings = config(
        prompts, layers=(2,), gate="linear", readout="deep", shortlist=100, confidence="max-prob", threshold=0.05,
        answer_tokens=24,
    )  # fmt: skip
    exits = train(backbone, tmp_path / "exits", settings)
    assert exits.policy == Policy((0.05,), "max-prob")
    assert exits.training["tokens"]["gates"] < exits.training["tokens"]["adapters"] / 8  # one text: drafts need no gate
    assert "gate_auroc" not in exits.training["validation"][0]
    assert len(exits.shortlist) == 100
    held = exits.training["validation"][0]
    assert all(both > 0 for both in held["with_table"])
    assert held["with_table"] != held["acceptance"]
    backbone.use_compiled_blocks("float32")
    full, drafting = Engine(backbone), costing(Engine(backbone, exits, fill="verify", lookup=0), row=0.02)
    answers = [drafting.generate(line, max_tokens=12) for line in read_lines(prompts, ())[:8]]
    assert [answer.ids for answer in answers] == [
        full.generate(line, max_tokens=12).ids for line in read_lines(prompts, ())[:8]
    ]
    assert sum(answer.tokens_per_deep_pass for answer in answers) > 8
    drafts = {token.id for answer in answers for token in answer.tokens if token.exit_block == 2}
    assert drafts <= set(exits.shortlist.tolist())


@pytest.mark.skipif("llama" not in COMPILED, reason="needs a C compiler")
@pytest.mark.parametrize("dtype", ["int4", "bfloat16"])
def test_a_draft_with_a_tail_is_trained_and_judged_in_fewer_bits(tmp_path, prompts: str, dtype: str) -> None:
    """The tail's weights may be in bfloat16, though hidden states are float32."""
    alike = tiny("llama")
    backbone = Backbone(copy.deepcopy(alike.model), alike.tokenizer, alike.source)
    backbone.use_compiled_blocks(dtype)
    exits = train(backbone, tmp_path, config(prompts, layers=(0,), tails=(1,), gate="linear", readout="deep"))
    assert 0 <= exits.training["validation"][0]["acceptance"][0] <= 1


@pytest.mark.parametrize("tails", [(), (0,)])  # the usual place of drafts in a Mamba model says that there is no tail
def test_drafts_without_a_tail_go_on_from_others(tmp_path, prompts: str, tails: tuple[int, ...]) -> None:
    settings = config(prompts, layers=(0,), gate="linear", readout="deep", epochs=0, gate_epochs=0)
    before = train(tiny("mamba"), tmp_path / "before", settings)
    after = train(tiny("mamba"), tmp_path / "after", replace(settings, tails=tails), start=before)
    assert after.config == before.config
    with pytest.raises(BadInput, match="at other places"):
        train(tiny("mamba"), tmp_path / "other", replace(settings, tails=(1,)), start=before)


@pytest.mark.parametrize(
    ("places", "hint"),
    [
        ({"layers": (2,), "tails": (1,)}, "--tails 0."),
        ({"layers": None, "epochs": None, "hours": 0.01}, "--tails 0,0,0."),  # a trial would find the tails
    ],
)
def test_drafts_that_cannot_be_trained_are_refused_before_any_answer(tmp_path, prompts: str, places, hint: str) -> None:
    seen: list[str] = []
    settings = config(prompts, gate="linear", readout="deep", **places)
    with pytest.raises(BadInput, match="not all attention: drafts cannot be trained") as caught:
        train(tiny("bamba"), tmp_path / "exits", settings, lambda stage, *_: seen.append(stage))
    assert caught.value.hint.endswith(hint)
    assert not seen


class Interrupt:
    """Progress that presses Ctrl-C at the n-th report of a stage."""

    def __init__(self, stage: str, at: int) -> None:
        self.stage, self.left = stage, at

    def __call__(self, stage: str, completed: int, total: int, note: str = "") -> None:
        self.left -= stage == self.stage
        if self.left < 0:
            raise KeyboardInterrupt


def checkpoint_after_every_step(monkeypatch) -> None:
    clock = itertools.count(step=50)  # seconds a step, more than the time between checkpoints
    monkeypatch.setattr("offramp.training.loop.time.monotonic", lambda: next(clock))


@pytest.mark.parametrize(("stage", "at"), [("reading", 2), ("adapters", 5), ("labels", 1), ("gates", 2)])
def test_ctrl_c_and_resume_give_the_result_of_an_uninterrupted_run(
    tmp_path, prompts: str, monkeypatch, stage: str, at: int
) -> None:
    checkpoint_after_every_step(monkeypatch)
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


def test_a_half_written_checkpoint_is_not_used(tmp_path, prompts: str, monkeypatch) -> None:
    settings = config(prompts, epochs=2)
    straight = train(tiny("llama"), tmp_path / "straight", settings)
    checkpoint_after_every_step(monkeypatch)
    save_state, saves = Accelerator.save_state, itertools.count(1)

    def cut_short(self: Accelerator, folder: str) -> None:
        save_state(self, folder)
        if next(saves) == 3:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "save_state", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train(tiny("llama"), tmp_path / "broken", settings)
    assert [path.name for path in (tmp_path / "broken" / ".training" / "adapters").glob("step-*")] == ["step-000000002"]
    resumed = train(tiny("llama"), tmp_path / "broken", settings)
    for key, value in straight.modules.state_dict().items():
        assert torch.equal(value, resumed.modules.state_dict()[key]), key


def test_an_unfinished_training_is_not_mixed_with_another(tmp_path, prompts: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny("llama"), tmp_path, config(prompts), Interrupt("adapters", 3))
    with pytest.raises(BadInput, match="other settings"):
        train(tiny("llama"), tmp_path, config(prompts, seed=1))


def test_damaged_work_files_are_named(tmp_path, prompts: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny("llama"), tmp_path, config(prompts), Interrupt("labels", 1))
    (checkpoint,) = (tmp_path / ".training" / "adapters").glob("step-*")
    (checkpoint / "optimizer.bin").write_bytes(b"PK")
    with pytest.raises(CorruptFile, match="checkpoint"):
        train(tiny("llama"), tmp_path, config(prompts))
    shard = sorted((tmp_path / ".training").glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CorruptFile, match="shard"):
        train(tiny("llama"), tmp_path, config(prompts))


def resident_bytes() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux only")
def test_memory_does_not_grow_with_the_text(tmp_path, prompts: str) -> None:
    """Of 192 MB of hidden states, every stage that reads them holds a small part at a time."""
    tokens, shards = 48, []
    for index in range(8):
        count = 128 * tokens
        shards.append(tmp_path / f"{index}.safetensors")
        hidden = torch.randn(tokens, 61, HIDDEN).half().repeat(128, 1, 1)  # many exits, so that texts are few and large
        top_ids = torch.randint(0, 260, (count, 16), dtype=torch.int)
        rest = {"lengths": torch.full((128,), tokens), "counted": torch.ones(count, dtype=torch.bool)}
        top = {"top_ids": top_ids, "top_logp": torch.zeros(count, 16).half(), "ids": top_ids[:, 0].contiguous()}
        save_file({"hidden": hidden, **top, **rest}, shards[-1])
    size = sum(shard.stat().st_size for shard in shards)
    del hidden
    backbone, texts = tiny("llama"), TeacherTexts.open(shards)
    exits = Exits.new(backbone, ExitsConfig(LAYERS, "linear", "linear", 16, 32))
    most, before = 0, resident_bytes()

    def progress(stage: str, completed: int, total: int, note: str = "") -> None:
        nonlocal most
        most = max(most, resident_bytes())

    trainer = Trainer(backbone, exits, config(prompts, epochs=1, gate_epochs=1), tmp_path, progress)
    trainer.standardise(texts)
    sketch_of(backbone, texts, 16, trainer.fit)
    trainer.fit_adapters(texts)
    labelled = trainer.labels(texts)
    trainer.fit_gates(labelled)
    evidence(exits, labelled)
    progress("scores", 1, 1)
    assert len(texts) == 1024
    assert most - before < size / 4


WORKER = """
import sys
from pathlib import Path
from test_training import config, tiny, train, train_equally_long

folder, prompts = Path(sys.argv[1]), sys.argv[2]
train_equally_long(folder, prompts)
train(tiny("llama"), folder / "exits", config(prompts, epochs=1, gate_epochs=1))
"""


def train_equally_long(folder: Path, prompts: str) -> None:
    """Train exits on texts of one length, every position of which counts, and save them with their losses."""
    backbone, texts = tiny("llama"), equally_long_texts()
    torch.manual_seed(0)
    exits = Exits.new(backbone, ExitsConfig(LAYERS, "ffn", "mamba", 16, 32))
    trainer = Trainer(backbone, exits, config(prompts, batch=4, epochs=2, gate_epochs=2), folder)
    trainer.fit_adapters(texts)
    trainer.fit_gates(trainer.labels(texts))
    torch.save({"curve": trainer.fit.curve, **exits.modules.state_dict()}, folder / "trained.pt")


def equally_long_texts() -> list[TeacherText]:
    """Twelve texts, every position of which counts."""
    g = torch.Generator().manual_seed(1)
    count, counted = (10, 16), torch.ones(10, dtype=torch.bool)
    return [
        TeacherText(
            torch.randint(0, 256, (10,), generator=g),
            torch.randn(10, 2, HIDDEN, generator=g).half(),
            torch.stack([torch.randperm(256, generator=g)[:16] for _ in range(10)]).int(),
            torch.randn(count, generator=g).half(),
            counted,
        )
        for _ in range(12)
    ]


def test_two_processes_train_the_exits_of_one(tmp_path, prompts: str) -> None:
    """Each process takes half of every batch. `train` runs in both, and saves the exits once."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train_equally_long(tmp_path / "one", prompts)
    (tmp_path / "worker.py").write_text(WORKER)
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "worker.py"), str(tmp_path / "two"), prompts]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True, timeout=100)
    in_one, in_two = (torch.load(tmp_path / name / "trained.pt") for name in ("one", "two"))
    for alone, shared in zip(in_one.pop("curve"), in_two.pop("curve"), strict=True):
        assert alone["loss"] == pytest.approx(shared["loss"], abs=2e-4)
    for key, value in in_one.items():
        torch.testing.assert_close(in_two[key], value, rtol=1e-3, atol=1e-3)
    exits = Exits.load(tmp_path / "two" / "exits", tiny("llama"))
    assert [row["block"] for row in exits.training["validation"]] == list(LAYERS)
    assert not (tmp_path / "two" / "exits" / ".training").exists()


def test_a_run_of_twenty_steps_trains(tmp_path) -> None:
    """The warm-up of so short a run is exactly one step."""
    module = torch.nn.Linear(1, 1)
    fit = Fit(tmp_path, torch.device("cpu"), batch=1)
    fit.run(
        "line",
        module,
        range(20),
        Budget(20),
        1e-2,
        lambda batch, step: (module.weight.square().sum(), [module.weight.sum()]),
    )
    assert fit.curve[-1]["step"] == 20


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


@pytest.mark.parametrize("family", ["llama", "mamba", "mamba2", "bamba", "gemma2"])
def test_jumps_learn_to_say_what_the_model_says(tmp_path, prompts: str, family: str) -> None:
    settings = config(prompts, layers=(2, 3), tails=(2, 1), readout="ffn", temperatures=(0.0, 0.8), answers=80, epochs=12)
    after = train(tiny(family), tmp_path / "after", settings)
    losses = [point["loss"] for point in after.training["curve"] if point["stage"] == "adapters"]
    for exit in range(2):
        assert fmean(loss[exit] for loss in losses[-6:]) < losses[0][exit] - 0.1
    assert [row["tail"] for row in after.training["validation"]] == [2, 1]
    assert all(0 <= row["agreement"] <= 1 for row in after.training["validation"])
    with pytest.raises(BadInput, match="at other places"):
        train(tiny(family), tmp_path / "other", replace(settings, layers=(1, 3)), start=after)
    # They go on from where they stopped.
    other = tmp_path / "other.txt"
    other.write_text("".join(f"Another {number}\n" for number in range(80)))
    nothing = replace(settings, prompts=str(other), epochs=0, gate_epochs=0)
    again = train(tiny(family), tmp_path / "again", nothing, start=after)
    # The records say which prompts they learned from, in both trainings; each hash once.
    lines = [lines_of(each) for each in (settings, nothing)]
    assert after.training["prompt_hashes"] == hashes_of(lines[0])
    assert again.training["prompt_hashes"] == hashes_of(lines[0] + lines[1])
    assert "prompt_hashes" not in again.training["start"]
    assert again.training["tokens"]["gates"] > again.training["tokens"]["adapters"]  # which learn nothing
    for key, value in after.modules.state_dict().items():
        assert torch.equal(again.modules.state_dict()[key], value), key


@pytest.mark.parametrize("family", [family for family in ANSWERING if family != "bamba"])
def test_answers_are_drawn_at_their_temperatures(tmp_path, family: str) -> None:
    backbone = tiny(family)
    prompt = backbone.prompts.encode("Some words")
    temperatures = [0.0] * 2 + [1.0] * 60
    groups = group_texts([prompt] * 62, [], 6, 31, temperatures)
    assert [group.temperatures for group in groups] == [tuple(temperatures[:31]), tuple(temperatures[31:])]
    texts = TeacherTexts.open(write_shards(backbone, groups, LAYERS, tmp_path / "one"))
    answers = [tuple(text.ids[len(prompt) :].tolist()) for text in texts]
    assert answers[0] == answers[1] == tuple(texts[0].top_ids[len(prompt) - 1 : -1, 0].tolist())
    assert len(set(answers[2:])) > 50
    # The first tokens are drawn by the teacher's probabilities.
    first = texts[0].top_ids[len(prompt) - 1].tolist()
    chances = texts[0].top_logp[len(prompt) - 1].float().softmax(-1)
    counts = torch.zeros(16)
    for answer in answers[2:]:
        counts[first.index(answer[0])] += 1
    assert float((counts / 60 - chances).abs().sum()) < 0.6
    # The same groups give the same shards where half of the work was done before, and where two processes divide it.
    whole = [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())]
    resumed, divided = tmp_path / "resumed", tmp_path / "divided"
    resumed.mkdir()
    shutil.copy(tmp_path / "one" / "shard-00000.safetensors", resumed)
    write_shards(backbone, groups, LAYERS, resumed)
    for process in (1, 0):
        write_shards(backbone, groups, LAYERS, divided, share=slice(process, None, 2))
    for folder in (resumed, divided):
        assert [path.read_bytes() for path in sorted(folder.iterdir())] == whole


def test_unfinished_text_is_a_fair_sample_of_the_whole(tmp_path) -> None:
    """Of prompts that get longer, the first half of the shards that are made has as many short ones as long ones."""
    lengths = []

    def make(backbone: Backbone, groups: list[TextGroup], layers: tuple[int, ...], shared: int):
        lengths.extend(len(group.ids[0]) for group in groups)
        yield from ()

    prompts = [[5] * length for length in range(1, 101)]
    write_shards(tiny("llama"), group_texts(prompts, [], 6, 4), LAYERS, tmp_path, make=make)
    assert sorted(lengths) == [*range(1, 101)]
    assert 15 <= sum(length <= 50 for length in lengths[:50]) <= 35


def test_states_too_large_for_float16_are_kept(tmp_path) -> None:
    """Gemma 3 has such states at the first token of a text."""
    model = copy.deepcopy(tiny("llama").model)
    model.get_input_embeddings().weight.data.mul_(1e6)
    backbone = Backbone(model, tiny("llama").tokenizer, Source("loud", ""))
    (text,) = TeacherTexts.open(write_shards(backbone, group_texts([[40, 41]], [], 6, 4), LAYERS, tmp_path))
    assert text.hidden.isfinite().all()
    assert text.hidden.abs().max() > torch.finfo(torch.float16).max


def test_a_model_that_gives_no_numbers_ends_the_work(tmp_path) -> None:
    with pytest.raises(BadNumbers):
        write_shards(damaged(tiny("llama")), group_texts([[40, 41]], [], 6, 4), LAYERS, tmp_path)


def test_prompts_are_answered_in_turn_at_every_temperature() -> None:
    asked, temperatures = turns([[1], [2]], (0.0, 0.5, 1.0), 5)
    assert asked == [[1], [2], [1], [2], [1]]
    assert temperatures == [0.0, 0.5, 0.5, 1.0, 1.0]


def test_batches_hold_every_text_once_and_similar_ones_together() -> None:
    lengths = [7 * index % 101 for index in range(100)]
    found = batches(100, 8, torch.Generator().manual_seed(0), lengths)
    assert sorted(index for batch in found for index in batch) == list(range(100))
    spread = [max(lengths[index] for index in batch) - min(lengths[index] for index in batch) for batch in found]
    assert max(spread) < 12
    assert found != batches(100, 8, torch.Generator().manual_seed(1), lengths)


def test_a_time_is_kept_and_said_beforehand(tmp_path, prompts: str, monkeypatch) -> None:
    said: list[str] = []

    def progress(stage: str, completed: int, total: int, note: str = "") -> None:
        said.extend([note] if stage == "plan" else [])

    settings = config(prompts, layers=None, hours=0.001, epochs=None, gate_epochs=None)
    hours: list[float | None] = []
    fit_adapters = Trainer.fit_adapters

    def timed(self: Trainer, texts: TeacherTexts, given: float | None = None) -> None:
        hours.append(given)
        fit_adapters(self, texts, given)

    monkeypatch.setattr(Trainer, "fit_adapters", timed)
    exits = train(tiny("llama"), tmp_path, settings, progress)
    *trial, whole = hours
    assert sum(trial) == pytest.approx(TRYING * 0.001)
    assert whole == pytest.approx(DECIDING[1] * 0.001)
    words = (
        r"exits after blocks 2 \+ \d, 3 \+ \d, 4 \+ \d; [\d,]+ answers of about \d+ tokens in \d+ min; \d+ min of training"
    )
    assert re.fullmatch(words, said[0])
    plan = exits.training["plan"]
    assert 3 <= plan["answers"] <= 12 * 40
    assert plan["adapter_hours"] == pytest.approx(DECIDING[1] * 0.001)
    assert plan["tails"] == [exit.tail for exit in exits]
    spent = [point for point in exits.training["curve"] if point["stage"] == "adapters"]
    assert spent


def test_a_threshold_is_the_lowest_that_keeps_the_precision() -> None:
    confidence = torch.linspace(0, 1, 1001)
    agrees = confidence > 0.4
    threshold, leaving = lowest(confidence, agrees, precision=0.9)
    assert leaving == int((confidence > threshold).sum())
    assert agrees[confidence > threshold].float().mean() >= 0.9
    assert agrees[confidence > threshold - 0.0011].float().mean() < 0.9  # the tokens are 0.001 apart
    assert lowest(confidence, torch.zeros(1001, dtype=torch.bool), 0.9) == (1.0, 0)


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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": -1}, "epochs"),
        ({"answer_tokens": 0}, "answer tokens"),
        ({"top_k": 0}, "top k"),
        ({"max_prompts": -3}, "max prompts"),
        ({"learning_rate": -1.0}, "learning rate"),
        ({"precision": 2.0}, "precision"),
    ],
)
def test_settings_that_cannot_train_are_named(settings: dict, words: str) -> None:
    with pytest.raises(BadInput, match=words) as raised:
        TrainConfig(**settings)
    assert raised.value.hint


def test_no_epochs_leave_the_exits_untrained(tmp_path, prompts: str) -> None:
    exits = train(tiny("llama"), tmp_path, config(prompts, epochs=0, gate_epochs=0))
    assert exits.training["curve"] == []


def test_another_accelerator_in_the_process_keeps_its_precision() -> None:
    own = Accelerator(mixed_precision=accelerator_for(torch.device("cpu")).mixed_precision)
    for bfloat16 in (True, False):
        accelerator_for(torch.device("cpu"), bfloat16)
        assert own.mixed_precision == "no"


def test_gates_learn_which_sure_tokens_do_harm() -> None:
    """Sure tokens count the less, the more later tokens change; those whose harm is known stand for the others."""
    count = 200
    labels = Labels.unknown(torch.zeros(count, 1), 1)
    labels.agrees[:] = 1
    labels.top_prob[:, 0] = torch.linspace(0.5, 1, count)
    labels.agrees[: count // 2] = 0
    labelled = LabelledTexts([], [labels], {})
    (key,), weights = gate_targets(labelled, "key")
    assert weights.tolist() == [1]
    assert torch.equal(gate_targets(labelled, "harmless")[0][0], key)  # as long as no harm was measured
    assert key[: count // 2 - 10].sum() == 0
    assert key[count // 2 :].all()
    labels.harm[:, 0] = torch.tensor([0.0, MISSED] * (count // 2))
    labels.harm[0] = labels.harm[-1] = torch.nan
    (wanted,), weights = gate_targets(labelled, "harmless")
    assert wanted[-1] == -1
    assert wanted[-2] == 1 == wanted[-4]
    assert float(wanted[-3]) == pytest.approx(math.exp(-1), rel=1e-5)
    assert wanted[: count // 2 - 10].abs().sum() == 0  # they may not leave, so their harm does not matter
    leaving = int((key > 0).sum())
    assert float(weights[0]) == pytest.approx(leaving / (leaving - 1))
    labels.harm[key[:, 0] > 0] = torch.nan  # only tokens that stay anyway were measured
    (wanted,), weights = gate_targets(labelled, "harmless")
    assert torch.equal(wanted, key)
    assert weights.tolist() == [1]


@torch.inference_mode()
def test_harm_is_measured_for_few_tokens_of_each_text(tmp_path, prompts: str) -> None:
    backbone = tiny("llama")
    groups = group_texts([backbone.prompts.encode(line) for line in read_lines(prompts, ())], [], 12, 4)
    exits = Exits.new(backbone, ExitsConfig((2, 3), tails=(2, 1)))
    trainer = Trainer(backbone, exits, config(prompts), tmp_path)
    texts = TeacherTexts.open(write_shards(backbone, groups, needed_layers(exits), tmp_path))
    labelled = trainer.labels(texts)
    for labels in labelled.labels:
        labels.top_prob[:] = 1  # as if the exits were sure of all tokens
    trainer.measure_harm(labelled, most=3)
    for labels in labelled.labels:
        known = ~labels.harm.isnan()
        assert known.sum(0).tolist() == [min(3, len(labels.harm))] * 2
        assert (labels.harm[known & (labels.agrees != 1)] == 0).all()
    labelled.labels[0].top_prob[:] = 0
    trainer.measure_harm(labelled, most=3)
    assert (labelled.labels[0].harm == 1).all()
