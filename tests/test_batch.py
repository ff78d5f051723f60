"""How prompts are read beside answers: what a step reads, who waits for whom, and that none of it changes an answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from helpers import modest_exits
from models import COMPILED, compiled_only, tiny
from offramp import Engine, Policy
from offramp.decode import batch as batch_module
from offramp.decode import beginnings
from offramp.decode.batch import Batch
from offramp.decode.pace import HELD, LEAST, Pace
from offramp.decode.request import Decided, Prefilled, Reading, Request, Talk

FAMILY = "llama/compiled"
FILLS = ["full", "defer", "verify", "project"]
KINDS = [f"{family}/compiled" for family in COMPILED[:2]]


def text(length: int, seed: int) -> list[int]:
    """A random prompt that begins like no other."""
    dice = random.Random(seed)
    return [dice.randrange(32, 127) for _ in range(length)]


def engine_of(family: str, fill: str = "full") -> Engine:
    if fill == "full":
        return Engine(tiny(family))
    return Engine(tiny(family), modest_exits(family, gate="linear"), Policy((0.4,) * 3), fill)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[Request, int], list[Request]]]:
    """For each step, the rows that each prompt had read in it, and the requests that decided."""
    seen: list[tuple[dict[Request, int], list[Request]]] = []
    step: Callable[..., Any] = Batch._step

    def noted(batch: Batch, reading: Any, deciding: list[Request]) -> Any:
        seen.append(({request: end - request.sequence.run for request, end in reading}, deciding))
        return step(batch, reading, deciding)

    monkeypatch.setattr(Batch, "_step", noted)
    return seen


def reads(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let steps read so many rows beside answers."""
    monkeypatch.setattr(Pace, "rows", lambda pace, deciding: rows)


def ids_of(request: Request) -> list[int]:
    return [token.id for token in request.tokens]


@compiled_only
def test_one_call_reads_pieces_of_several_prompts_and_decides(monkeypatch, steps) -> None:
    reads(monkeypatch, 20)
    batch = engine_of(FAMILY).batch()
    stream = batch.add([65], max_tokens=40)
    batch.step()
    others = [batch.add(text(30, seed), max_tokens=2) for seed in (1, 2)]
    calls = []
    step = type(batch._steppers.compiled).step
    monkeypatch.setattr(type(batch._steppers.compiled), "step", lambda *given: (calls.append(given[1:]), step(*given))[1])
    batch.step()
    assert [(dict(reading), deciding) for reading, deciding in calls] == [({others[0]: 20}, [stream])]
    batch.step()
    assert steps[-1] == ({others[0]: 9, others[1]: 11}, [stream])


@compiled_only
def test_a_stream_is_never_held_by_more_rows_than_there_is_time_for(monkeypatch, steps) -> None:
    reads(monkeypatch, 20)
    batch = engine_of(FAMILY).batch()
    stream = batch.add([65], max_tokens=100)
    batch.step()
    long = batch.add(text(300, 1), max_tokens=2)
    while not long.prefilled:
        told = len(stream.tokens)
        batch.step()
        assert len(stream.tokens) > told
    read = [rows[long] for rows, _ in steps if long in rows]
    assert read == [20] * 14 + [19]
    assert all(stream in deciding for rows, deciding in steps if rows.get(long))


@compiled_only
def test_nobody_is_held_while_nobody_decodes(monkeypatch, steps) -> None:
    reads(monkeypatch, 20)
    batch = engine_of(FAMILY).batch()
    batch.add(text(400, 1), max_tokens=2)
    batch.step()
    assert [*steps[0][0].values()] == [399]


@compiled_only
def test_a_long_prompt_leaves_half_of_a_step_to_short_ones(monkeypatch, steps) -> None:
    monkeypatch.setattr(batch_module, "MOST_READ", 20)
    batch = engine_of(FAMILY).batch()
    long = batch.add(text(300, 1), max_tokens=1)
    short = [batch.add(text(6, seed), max_tokens=1) for seed in (2, 3)]
    batch.step()
    assert steps[0][0] == {long: 10, short[0]: 5, short[1]: 5}
    assert [request.prefilled for request in short] == [True, True]
    later = [batch.add(text(30, seed), max_tokens=1) for seed in range(4, 30)]
    while not long.prefilled:
        batch.step()
    assert len(steps) <= 31  # at least 10 rows of the long one in each
    assert any(request.prefilled for request in later)


@compiled_only
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("family", KINDS)
def test_answers_are_those_of_prompts_that_are_read_alone(family: str, fill: str, monkeypatch, steps) -> None:
    monkeypatch.setattr(beginnings, "ALIKE", 8)
    engine, start = engine_of(family, fill), text(20, 0)
    prompts = [text(3, 1), start + text(50, 2), start[:12] + text(40, 3), start + text(9, 4), text(70, 5), start[:19]]
    alone = [engine.generate(prompt, max_tokens=12) for prompt in prompts]
    for rows in (1, 7, 64):
        reads(monkeypatch, rows)
        batch = engine.batch()
        requests = [batch.add(prompts[0], max_tokens=12)]
        batch.step()
        requests += [batch.add(prompt, max_tokens=12) for prompt in prompts[1:4]]
        batch.step()
        requests += [batch.add(prompt, max_tokens=12) for prompt in prompts[4:]]
        steps.clear()
        list(batch.run())
        assert any(pieces and deciding for pieces, deciding in steps)
        assert [ids_of(request) for request in requests] == [answer.ids for answer in alone]
        if fill != "verify":  # how many drafts pay depends on who else decides
            assert [request.tokens for request in requests] == [answer.tokens for answer in alone]


@pytest.mark.parametrize("family", ["llama", *KINDS])
def test_what_waiting_prompts_begin_with_is_read_once(family: str, steps) -> None:
    engine, start = engine_of(family), text(40, 0)
    prompts = [[*start, seed, *text(8, seed)] for seed in range(1, 5)]
    batch = engine.batch()
    requests = [batch.add(prompt, max_tokens=5) for prompt in prompts]
    list(batch.run())
    assert sum(sum(rows.values()) for rows, _ in steps) == 40 + 4 * 8
    assert [ids_of(request) for request in requests] == [engine.generate(prompt, max_tokens=5).ids for prompt in prompts]


@compiled_only
def test_longer_beginnings_that_fewer_share_are_read_once_too(steps) -> None:
    engine, a, b = engine_of(FAMILY), text(40, 0), text(60, 1)
    ends = [[seed, *text(8, seed)] for seed in range(5)]
    prompts = [a + b + ends[0], a + b[:35] + ends[1], ends[2] * 6, a + ends[3], a + b + ends[4], a + b + ends[0]]
    batch = engine.batch()
    for prompt in prompts:
        batch.add(prompt, max_tokens=5)
    list(batch.run())
    # The second goes on from the first at 75, the fourth at 40, the fifth at 100. The last one reads nothing.
    assert sum(sum(rows.values()) for rows, _ in steps) == 108 + 8 + 53 + 8 + 8


@compiled_only
def test_one_that_waits_reads_by_itself_when_its_reader_leaves(monkeypatch, steps) -> None:
    monkeypatch.setattr(batch_module, "PIECE", 10)
    engine, start = engine_of(FAMILY), text(40, 0)
    prompts = [start + text(9, seed) for seed in range(1, 4)]
    batch, talk = engine.batch(), Talk()
    first, second, third = batch.add(prompts[0]), batch.add(prompts[1], talk, max_tokens=5), batch.add(prompts[2])
    batch.step()
    assert [*steps[0][0]] == [first]
    batch.cancel(first)
    list(batch.run())
    assert sum(sum(rows.values()) for rows, _ in steps[1:]) == 48 + 8  # the third waited for the second then
    assert ids_of(second) == engine.generate(prompts[1], max_tokens=5).ids
    assert ids_of(third) == engine.generate(prompts[2]).ids
    more = [*prompts[1], *ids_of(second), 65]
    assert [token.id for token in engine.stream(more, talk, max_tokens=5)] == engine.generate(more, max_tokens=5).ids


@compiled_only
def test_one_that_waits_can_leave(monkeypatch) -> None:
    engine, start = engine_of(FAMILY), text(40, 0)
    batch = engine.batch()
    first, second = (batch.add(start + text(9, seed), max_tokens=3) for seed in (1, 2))
    batch.cancel(second)
    assert [event.request for event in batch.run() if isinstance(event, Prefilled)] == [first]
    assert second.finish_reason == "cancelled"
    assert not batch._beginnings.pauses(first)


@compiled_only
def test_reading_pauses_where_it_was_asked_to(monkeypatch) -> None:
    reads(monkeypatch, 16)
    batch = engine_of(FAMILY).batch()
    batch.add([65], max_tokens=60)
    batch.step()
    request = batch.add(text(60, 1), max_tokens=2)
    request.pauses = [9, 30]
    events = [event for event in batch.run() if getattr(event, "request", None) is request]
    assert [event.tokens for event in events if isinstance(event, Reading)] == [9, 25, 30, 46]


def test_a_prompt_is_cut_at_the_same_places_whatever_the_time_where_torch_runs_it(monkeypatch, steps) -> None:
    reads(monkeypatch, 5)
    monkeypatch.setattr(batch_module, "PIECE", 16)
    batch = engine_of("llama").batch()
    stream = batch.add([65], max_tokens=60)
    batch.step()
    long = batch.add(text(50, 1), max_tokens=2)
    while not long.prefilled:
        batch.step()
    assert [rows[long] for rows, _ in steps if long in rows] == [16, 16, 16, 1]
    assert len([event for event in batch.run() if isinstance(event, Decided)]) > len(stream.tokens) / 2


def test_a_batch_learns_how_much_it_can_read_while_answers_wait() -> None:
    pace = Pace(flops=10**12)
    assert pace.rows(8) == LEAST  # a careful guess
    for _ in range(30):
        rows = pace.rows(8)
        pace.note(rows + 8, HELD / 10 + (rows + 8) * HELD / 200)
    assert 170 <= pace.rows(8) <= 175  # with the eight, 90% of the time for 200
    pace.note(1, HELD)  # one row says nothing
    assert 170 <= pace.rows(8) <= 175
    for _ in range(30):
        pace.note(pace.rows(8) + 8, 100 * HELD)
    assert pace.rows(8) == LEAST
