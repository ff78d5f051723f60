"""Rows stay their own: what a sequence computes depends neither on its neighbours nor on how its text was read."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from helpers import costing, exact, modest_exits, same_or_tied, some_prompts
from models import COMPILED, compiled_only, tiny
from offramp import Engine, Policy
from offramp.decode import batch as batch_module
from offramp.decode.batch import Batch
from offramp.decode.embedding import embed_all
from offramp.decode.request import Decided, Prefilled, Reading, Talk
from offramp.decode.sampling import Sampling
from offramp.model.backbone import Backbone

FILLS = ["full", "defer", "verify", "project"]
KINDS = ["llama", *(f"{family}/compiled" for family in COMPILED[:2]), "bamba"]


@cache
@torch.inference_mode(False)
def compiled(family: str, format: str) -> Backbone:
    """A tiny model on compiled blocks in this format."""
    base = tiny(family)
    model = copy.deepcopy(base.model)
    backbone = Backbone(model.bfloat16() if format == "bfloat16" else model, base.tokenizer, base.source)
    backbone.use_compiled_blocks(format)
    return backbone


def engine_of(backbone: Backbone, family: str, fill: str) -> Engine:
    """An engine whose exits open now and then, or one at full depth.

    The exits have no memory: torch rounds a scan in another way for each length of the chunk, and confidences with it.
    """
    if fill == "full":
        return Engine(backbone)
    exits = modest_exits(family, gate="linear")
    if fill == "verify":  # if rows cost something, the number of drafts depends on how many answers share the chunk
        return costing(Engine(backbone, exits, Policy((1.0, 0.1, 0.1)), fill))
    return Engine(backbone, exits, Policy((0.4,) * 3), fill)


@compiled_only
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_an_answer_is_the_same_alone_and_among_any_number_of_others(family: str, format: str, fill: str) -> None:
    engine = engine_of(compiled(family, format), family, fill)
    prompts = some_prompts(70, seed=7)
    alone = [engine.generate(prompt, max_tokens=9).tokens for prompt in prompts[:7]]
    assert fill == "full" or any(token.exit_block < 6 for tokens in alone for token in tokens)
    for count in (7, 70):
        answers = engine.generate_batch(prompts[:count], max_tokens=9)
        assert [answer.tokens for answer in answers[:7]] == alone


@pytest.mark.parametrize("most", [1, 3, 99])
def test_the_next_prompt_takes_the_place_of_an_answer_that_ends(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompts = Engine(tiny("llama")), some_prompts(8, seed=4)
    choose = [Sampling(temperature=float(place % 2), seed=place).chooser() for place in range(8)]
    ends = frozenset(range(0, 257, 9))
    alone = [
        dict(engine.answers([ids], 1, [each], max_tokens=9, end_ids=ends))[0]
        for ids, each in zip(prompts, choose, strict=True)
    ]
    side_by_side, step = [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: side_by_side.append(len(batch.requests)) or step(batch))
    started = time.perf_counter()
    answers = dict(engine.answers(prompts, most, choose, max_tokens=9, end_ids=ends))
    spent = time.perf_counter() - started
    assert len({len(answer.tokens) for answer in alone}) > 2
    assert [answers[index].ids for index in range(8)] == [answer.ids for answer in alone]
    # All places are taken until no prompt waits.
    assert side_by_side == sorted(side_by_side, reverse=True)
    assert side_by_side[0] == min(most, 8)
    shares = [answer.prefill_seconds + len(answer.tokens) / answer.decode_tokens_per_second for answer in answers.values()]
    assert spent / 2 < sum(shares) <= spent


ANSWERS = """
import sys
sys.path.insert(0, sys.argv[1])
from helpers import some_prompts
from test_rows import FILLS, compiled, engine_of, tiny
for backbone, family in [(tiny("llama"), "llama"), *((compiled(name, "int4"), name) for name in sys.argv[2:])]:
    for fill in FILLS:
        for answer in engine_of(backbone, family, fill).generate_batch(some_prompts(3, seed=7), max_tokens=9):
            print([(token.id, token.exit_block, token.confidence) for token in answer.tokens])
"""


def test_another_process_gives_the_same_answer() -> None:
    """On the library's blocks, and in compiled code; with another order of Python's sets."""
    families = ["llama", "mamba2"] if COMPILED else []
    command = [sys.executable, "-c", ANSWERS, str(Path(__file__).parent), *families]
    runs = [
        subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE) for seed in ("1", "2")
    ]
    first, second = (run.communicate(timeout=300)[0] for run in runs)
    assert first == second
    assert first.count(b"\n") == 3 * len(FILLS) * (1 + len(families))


@compiled_only
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_an_answer_is_the_same_however_its_prompt_was_read(family: str, format: str, fill: str, monkeypatch) -> None:
    engine = engine_of(compiled(family, format), family, fill)
    prompt = [id for ids in some_prompts(12, seed=3) for id in ids]
    whole = engine.generate(prompt, max_tokens=9).tokens
    for piece in (1, 3, 64):
        monkeypatch.setattr(batch_module, "PIECE", piece)
        assert engine.generate(prompt, max_tokens=9).tokens == whole
        for length in (2, len(prompt) // 2, len(prompt) - 1):
            talk, fork = engine.forked(prompt[:length], 2)
            assert list(engine.stream(prompt, talk, max_tokens=9)) == whole
            assert list(engine.stream(prompt, fork, max_tokens=9)) == whole
    if fill in ("full", "verify"):  # what an answer leaves in memory is what reading it leaves there
        talk = Talk()
        first = [token.id for token in engine.stream(prompt, talk, max_tokens=5)]
        more = [*prompt, *first, 65, 66]
        continued = [token.id for token in engine.stream(more, talk, max_tokens=9)]
        assert continued == engine.generate(more, max_tokens=9).ids


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("readout", ["mamba", "deep"])
def test_a_prompt_in_pieces_gives_the_states_and_the_answer_of_the_whole(family: str, readout: str, monkeypatch) -> None:
    """Recurrent gates and read-outs too see each token once, in order."""
    backbone = tiny(family)
    engine = Engine(backbone, modest_exits(family, readout=readout), Policy((0.4,) * 3), "defer")
    prompt = [id for ids in some_prompts(5, seed=1) for id in ids]
    whole = engine.generate(prompt, max_tokens=12)
    monkeypatch.setattr(batch_module, "PIECE", 4)
    batch, talk = engine.batch(), Talk()
    batch.add(prompt, talk, max_tokens=12)
    events = [event for _ in range(-(-(len(prompt) - 1) // 4)) for event in batch.step()]
    total = len(prompt) - 1
    assert [(event.tokens, event.total) for event in events if isinstance(event, Reading)] == [
        (at, total) for at in range(4, total, 4)
    ]
    assert isinstance(events[-1], Prefilled)
    exact(talk.sequence, family)
    ids = [event.token.id for event in batch.run() if isinstance(event, Decided)]
    assert same_or_tied(family, prompt, ids, whole.ids)


def test_a_long_prompt_does_not_hold_up_other_answers(monkeypatch) -> None:
    monkeypatch.setattr(batch_module, "PIECE", 4)
    engine, (short, other) = Engine(tiny("llama")), some_prompts(2, seed=8)
    long = (other * 20)[:22]
    alone = [engine.generate(prompt, max_tokens=10).ids for prompt in (short[:4], long)]
    batch = engine.batch()
    first = batch.add(short[:4], max_tokens=10)
    batch.step()
    second = batch.add(long, max_tokens=10)
    counts = []
    while not second.prefilled:
        batch.step()
        counts.append(len(first.tokens))
    assert counts == [1, 2, 3, 4, 5, 6]  # a token and a piece in each step
    assert not second.tokens
    list(batch.run())
    assert [[token.id for token in request.tokens] for request in (first, second)] == alone


def test_a_step_reads_only_so_many_prompts(monkeypatch) -> None:
    monkeypatch.setattr(batch_module, "MOST_READ", 10)
    engine, prompts = Engine(tiny("llama")), some_prompts(9, seed=4)
    batch = engine.batch()
    requests = [batch.add(prompt, max_tokens=6) for prompt in prompts]
    batch.step()
    assert 0 < sum(request.prefilled for request in requests) < len(requests)
    list(batch.run())
    alone = [engine.generate(prompt, max_tokens=6).ids for prompt in prompts]
    assert [[token.id for token in request.tokens] for request in requests] == alone


def test_a_talk_goes_on_from_the_pieces_that_a_cancelled_request_has_read(monkeypatch) -> None:
    monkeypatch.setattr(batch_module, "PIECE", 4)
    engine, talk = Engine(tiny("llama")), Talk()
    prompt = [id for ids in some_prompts(5, seed=1) for id in ids]
    batch = engine.batch()
    request = batch.add(prompt, talk)
    batch.step()
    batch.cancel(request)
    assert talk.sequence.run == 4
    ids = [token.id for token in engine.stream(prompt, talk, max_tokens=8)]
    assert ids == engine.generate(prompt, max_tokens=8).ids


def test_only_long_prompts_report_progress(monkeypatch) -> None:
    monkeypatch.setattr(batch_module, "PIECE", 10)
    engine, reports = Engine(tiny("llama")), []
    prompts = [[65] * 8, [66] * 25, [67] * 16]
    engine.generate_batch(prompts[:1], max_tokens=3, progress=lambda *report: reports.append(report))
    assert not reports
    engine.generate_batch(prompts, max_tokens=3, progress=lambda *report: reports.append(report))
    assert reports[-1] == ("reading", 39, 39)
    completed = [report[1] for report in reports]
    assert completed == sorted(completed)
    assert len(completed) >= 3


@pytest.mark.parametrize("family", [*KINDS, "gpt2", "gemma2"])
@torch.inference_mode()
def test_embeddings_together_are_those_of_each_sequence(family: str) -> None:
    backbone = tiny(family)
    texts, firsts = [[[1]], [[2, 3], [4, 5]], [[6, 7, 8]]], [4, 0, 17]
    for (h, step), rows, first in zip(embed_all(backbone, texts, firsts), texts, firsts, strict=True):
        wanted, _ = backbone.embed(torch.tensor(rows), first)
        assert torch.equal(h, wanted)
        assert (step.batch, step.tokens) == (len(rows), len(rows[0]))
        states = backbone.state(), backbone.state()
        for state in states if first else ():  # which has read as many tokens
            before, made = backbone.embed(torch.zeros(len(rows), first, dtype=torch.int64), 0)
            backbone.run(before, 0, 2, state, made)
        outs = [
            backbone.run(x, 0, 2, state, made)
            for state, (x, made) in zip(states, ((h, step), backbone.embed(torch.tensor(rows), first)), strict=True)
        ]
        assert torch.equal(*outs)


def test_the_first_of_equal_logits_is_chosen() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert Sampling().chooser()(logits, []) == int(logits.argmax()) == 1
