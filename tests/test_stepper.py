"""The compiled stepper and the reference decide the same, in the same way."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from helpers import TAILS, modest_exits, refused, some_prompts
from models import BLOCKS, COMPILED, compiled_only, tiny
from offramp import Engine, Exits, Policy
from offramp.decode.compiled import CompiledStepper
from offramp.decode.fills import FILLS
from offramp.decode.request import Request, Token
from offramp.decode.sampling import Sampling
from offramp.model.compiled.library import MOST_DRAFTS

SAMPLINGS = [
    None,
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.9, seed=1),
    Sampling(temperature=1.2, top_k=30, top_p=0.9, min_p=0.001, repetition_penalty=1.1, seed=2),
]


@dataclass(frozen=True)
class Condition:
    """A condition of decoding, drawn at random."""

    exits: Exits
    policy: Policy
    sampling: Sampling | None
    options: dict[str, Any]
    prompts: list[list[int]]


def drawn(family: str, dice: random.Random) -> Condition:
    gate, readout = dice.choice(["linear", "ffn", "mamba"]), dice.choice(["none", "linear", "ffn", "deep"])
    exits = modest_exits(family, dice.randrange(100), gate, readout, dice.choice([(), TAILS, (3, 0, 0)]))
    shares = [dice.choice([0.9, 0.5, 0.1]) for _ in range(3)]
    exits.training = {"validation": [{"block": 1, "acceptance": shares}] if dice.random() < 0.5 else []}
    if dice.random() < 0.3:
        exits.shortlist = torch.arange(0, tiny(family).vocab_size, 2)
    kind = dice.choice(["gate", "keys", "max-prob", "margin", "entropy"])
    one = dice.choice([0.0, 0.02, 0.5, 0.6] if kind == "gate" else [0.0, 0.01, 0.02])
    policy = Policy((one, dice.choice([one, 1.0]), one), kind if kind != "keys" else "gate", dice.choice([0.0, 8.0]))
    if kind == "keys":
        key = dice.choice(["max-prob", "margin"])
        policy = replace(policy, thresholds=(0.55,) * 3, perhaps=(0.3, 0.4, 1.0), keys=(0.01, 0.02, 1.0), key=key)
    options = {"max_pending": dice.choice([1, 3, 7, None])}
    prompts = some_prompts(dice.choice([1, 4]), dice.randrange(99))
    if dice.random() < 0.5:  # they repeat themselves
        prompts = [prompt * 8 for prompt in prompts]
    return Condition(exits, policy, dice.choice(SAMPLINGS), options, prompts)


def decoded(family: str, fill: str, condition: Condition, compiled: bool) -> list[Request]:
    engine = Engine(tiny(family), condition.exits, condition.policy, fill, condition.sampling, **condition.options)
    assert engine.steppers.compiled
    engine.steppers.compiled = engine.steppers.compiled if compiled else None
    batch = engine.batch()
    requests = [batch.add(prompt, max_tokens=24) for prompt in condition.prompts]
    list(batch.run())
    return requests


def counts(token: Token) -> tuple[object, ...]:
    return (
        token.id,
        token.text,
        token.exit_block,
        token.blocks,
        token.flops,
        token.deep_passes,
        token.rejected,
        token.source,
        token.drafted,
    )


@compiled_only
@pytest.mark.parametrize("fill", [name for name, fill in FILLS.items() if not fill.verifies])
@pytest.mark.parametrize("family", [f"{family}/compiled" for family in COMPILED])
def test_both_steppers_decide_the_same_in_the_same_way(family: str, fill: str) -> None:
    if refused(fill, family):
        return
    dice, left = random.Random(f"{family} {fill}"), 0
    for _ in range(5):
        condition = drawn(family, dice)
        pairs = zip(*(decoded(family, fill, condition, compiled) for compiled in (True, False)), strict=True)
        for ours, theirs in pairs:
            assert [*map(counts, ours.tokens)] == [*map(counts, theirs.tokens)], condition
            for token in ours.tokens:
                assert (token.source == "full") == (token.exit_block == BLOCKS)
                assert not token.drafted
            for own, other in zip(ours.tokens, theirs.tokens, strict=True):
                assert own.confidence == pytest.approx(other.confidence, abs=2e-4)
            left += sum(token.exit_block < BLOCKS for token in ours.tokens)
    assert left


@compiled_only
def test_rows_that_read_make_drafts_dear() -> None:
    """Four more rows cost nothing, and each one after them a fortune: beside 16 rows of a prompt, nothing is drafted."""
    engine = Engine(tiny("llama/compiled"), modest_exits("llama"), fill="verify", max_pending=3, lookup=1)
    assert engine.plan.drafts
    engine.plan.drafts = replace(engine.plan.drafts, rows=tuple(1e6 * max(0, rows - 4) for rows in range(MOST_DRAFTS + 1)))
    engine.steppers.compiled = CompiledStepper.of(engine.plan)

    def drafts(read_at: int) -> list[int]:
        """How many drafts each of ten steps makes, if another request's prompt is read in one of them."""
        batch, made, known = engine.batch(), list[int](), 0
        one = batch.add([65, 66, 67] * 20, max_tokens=60, end_ids=frozenset(), stop=("\0",))  # one round a step
        while not one.prefilled:
            batch.step()
        for step in range(10):
            if step == read_at:
                batch.add([*range(40, 57)], max_tokens=1)
            batch.step()
            made.append(sum(token.drafted for token in one.tokens) + one.tokens[-1].rejected - known)
            known += made[-1]
        return made

    alone = drafts(-1)
    read_at = next(step for step in range(1, 10) if alone[step])
    assert drafts(read_at)[: read_at + 1] == [*alone[:read_at], 0]


@compiled_only
@pytest.mark.parametrize("family", ["llama/compiled", "bamba/compiled"])
def test_another_stepper_goes_on_with_a_text_or_reads_it_again(family: str) -> None:
    """Where exits keep something of a text, another stepper begins anew; the answer is the same."""
    for fill in ("project", "defer", "verify"):
        exits = modest_exits(family, gate="linear", tails=TAILS)
        engine = Engine(tiny(family), exits, Policy((0.4,) * 3), fill)
        prompt = some_prompts(1, seed=3)[0]
        wanted = engine.generate(prompt, max_tokens=12, end_ids=frozenset()).ids
        talk = engine.read(prompt)
        batch = engine.batch()
        request = batch.add(prompt, talk, lambda logits, ids: int(logits.argmax()), max_tokens=12, end_ids=frozenset())
        list(batch.run())
        assert [token.id for token in request.tokens] == wanted


@compiled_only
def test_a_fill_and_a_confidence_of_ones_own_run_in_the_reference(monkeypatch) -> None:
    class Own(FILLS["project"]):
        name = "own"

    monkeypatch.setitem(FILLS, "own", Own)
    exits, prompt = modest_exits("llama"), some_prompts(1, 3)[0]
    policy = Policy((0.3,) * 3)
    own, project = (Engine(tiny("llama/compiled"), exits, policy, fill) for fill in ("own", "project"))
    assert own.steppers.compiled is None is not project.steppers.compiled
    assert own.generate(prompt, max_tokens=12).ids == project.generate(prompt, max_tokens=12).ids


@compiled_only
def test_a_text_can_be_copied_after_its_engine_is_gone() -> None:
    """A copy of a text needs the shapes of the Mamba gates that have read it."""
    engine = Engine(tiny("llama/compiled"), modest_exits("llama", 3, "mamba"), Policy((0.5,) * 3))
    batch = engine.batch()
    request = batch.add([3, 1, 4, 1, 5], max_tokens=8)
    list(batch.run())
    plan, state = weakref.ref(engine.steppers.compiled._compiled), request.sequence.state
    del engine, batch, request
    gc.collect()
    assert plan() is state.plan
    twin = copy.deepcopy(state)
    assert [twin.length(block) for block in range(BLOCKS)] == [state.length(block) for block in range(BLOCKS)]
    del state, twin
    gc.collect()
    assert plan() is None
