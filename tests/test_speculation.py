"""Deferred and verified exits keep states exact, and verified tokens are full depth's, whatever the gates do."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    HYBRIDS,
    LAYERS,
    TAILS,
    after,
    costing,
    exact,
    exits_for,
    modest_exits,
    refused,
    same_or_tied,
    some_prompts,
    with_and_without_tails,
)
from models import BLOCKS, compiled_only, tiny
from offramp import Engine, Policy
from offramp.decode.fills import FILLS
from offramp.decode.request import Talk
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput
from offramp.model.state import SSM


@cache
def full_depth(family: str) -> list[tuple[list[int], list[int]]]:
    """Prompts, and full depth's answers."""
    engine, prompts = Engine(tiny(family)), some_prompts(3)
    return [(prompt, engine.generate(prompt, max_tokens=12).ids) for prompt in prompts]


@pytest.mark.parametrize(("kind", "tails"), [("mamba", TAILS), ("linear", ())])
def test_verified_exits_give_full_depths_tokens(family: str, kind: str, tails: tuple[int, ...]) -> None:
    exits = modest_exits(family, gate=kind, readout=kind, tails=tails)
    stood = rejected = 0
    for thresholds in ((0.0,) * 3, (0.3,) * 3, (1.0, 1.0, 0.0)):
        engine = costing(Engine(tiny(family), exits, Policy(thresholds), "verify", max_pending=4, lookup=0))
        for prompt, whole in full_depth(family):
            answer = engine.generate(prompt, max_tokens=12)
            assert same_or_tied(family, prompt, answer.ids, whole)
            stood += sum(token.exit_block < BLOCKS for token in answer.tokens)
            rejected += answer.tokens[-1].rejected
    assert stood > 0 < rejected or not engine.steppers.compiled  # right drafts and wrong ones were both tried


@compiled_only
def test_an_answer_that_a_stop_string_ends_has_the_work_of_its_whole_last_pass() -> None:
    engine = costing(Engine(tiny("llama/compiled"), modest_exits("llama"), Policy((0.0,) * 3), "verify"))
    prompt = [97, 98, 99] * 8
    whole = engine.generate(prompt, max_tokens=24)
    ends = 0
    for count in range(2, 24):  # tokens of an answer
        text, last = "".join(token.text for token in whole.tokens[:count]), whole.tokens[count - 1]
        stopped = engine.generate(prompt, max_tokens=24, stop=(text,))
        in_pass = [token for token in whole.tokens if token.deep_passes == last.deep_passes]
        if len(stopped.tokens) == count:
            ends += last is not in_pass[-1]
            assert stopped.tokens[-1].cumulative_flops == in_pass[-1].cumulative_flops
            assert sum(token.blocks for token in stopped.tokens) == sum(
                token.blocks for token in whole.tokens[: whole.tokens.index(in_pass[-1]) + 1]
            )
    assert ends > 2  # answers that ended before the last token of a pass


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_states_are_exact_after_any_run_of_exits(family: str, data: st.DataObject) -> None:
    fill = data.draw(st.sampled_from(["defer", "verify"]))
    thresholds = tuple(data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.999])) for _ in LAYERS)
    tokens, most = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8))
    tails = data.draw(st.sampled_from([(), TAILS, (4, 0, 0), (1, 1, 0)]))
    exits = modest_exits(family, data.draw(st.integers(0, 5)), tails=tails)
    keys = data.draw(st.sampled_from([{}, {"perhaps": (0.0, 0.3, 0.5), "keys": (0.3, 0.1, 0.05)}]))
    engine = Engine(tiny(family), exits, Policy(thresholds, **keys), fill, max_pending=most)
    if fill == "verify":
        costing(engine, data.draw(st.sampled_from([0.0, 0.1])), data.draw(st.sampled_from([0.0, 0.1])))
    (prompt,) = some_prompts(1, data.draw(st.integers(0, 99)))
    talk = Talk()
    answer = [token.id for token in engine.stream(prompt, max_tokens=tokens, talk=talk)]
    assert len(answer) == tokens or answer[-1] == 257
    assert talk.sequence.ids == prompt + answer  # nothing is drafted beyond the end
    assert talk.sequence.pending <= most
    exact(talk.sequence, family)
    # In another turn, waiting tokens are carried along, and nothing is read twice.
    more = [*talk.sequence.ids, *some_prompts(1, tokens)[0]]
    before = talk.sequence
    batch = engine.batch()
    batch.add(more, talk, max_tokens=4)
    batch.step()
    assert talk.sequence is before
    assert talk.sequence.pending == 0
    exact(talk.sequence, family)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["olmo2", "bamba"])
def test_the_comparison_of_states_sees_one_wrong_row(family: str) -> None:
    sequence = after(Engine(tiny(family), modest_exits(family), Policy((0.999, 0.0, 0.0)), "defer", max_pending=1), 9)
    exact(sequence, family)
    state = sequence.state
    memories = [memory for kv in state.kv if kv for memory in (kv.keys, kv.values)]
    memories += [memory for ssm in state.ssm if ssm for memory in (ssm.window, ssm.h)]
    for memory in memories:
        row = memory[:, 1, 0]
        kept = row.clone()
        row += 1e-3 * memory.abs().max()
        with pytest.raises(AssertionError, match="not close"):
            exact(sequence, family)
        row.copy_(kept)
    exact(sequence, family)


def test_what_an_exit_said_stands_with_defer() -> None:
    engine = Engine(tiny("llama"), exits_for("llama"), Policy((0.0,) * 3), "defer", max_pending=3)
    answer = engine.generate("Some words", max_tokens=12)
    assert [token.exit_block for token in answer.tokens] == [1, 1, 1, BLOCKS] * 3
    assert (answer.tokens_per_deep_pass, answer.acceptance_rate) == (4, None)


@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled", "bamba/compiled"])
def test_the_books_of_verified_decoding_balance(family: str) -> None:
    engine = costing(Engine(tiny(family), modest_exits(family), Policy((0.3,) * 3), "verify"))
    for prompt in some_prompts(5):
        answer = engine.generate(prompt, max_tokens=24)
        end = answer.tokens[-1]
        assert end.cumulative_flops == sum(token.flops for token in answer.tokens)
        deep = sum(token.exit_block == BLOCKS for token in answer.tokens)
        assert end.deep_passes == deep
        stood = len(answer.tokens) - deep
        assert answer.acceptance_rate == pytest.approx(stood / (stood + end.rejected))


def test_drafts_do_not_run_past_the_end_of_a_text_or_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, exits = tiny("llama/compiled"), modest_exits("llama")
    (prompt,) = some_prompts(1)
    free = Engine(backbone).generate(prompt, max_tokens=16).ids
    engine = costing(Engine(backbone, exits, Policy((0.0,) * 3), "verify"))
    for limit in range(1, 9):
        assert engine.generate(prompt, max_tokens=limit).ids == free[:limit]
    monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", [257, free[6]])
    assert engine.generate(prompt, max_tokens=16).ids == free[: free.index(free[6]) + 1]


def test_verified_samples_are_full_depths_samples() -> None:
    for family in ("llama/compiled", "mamba2/compiled", "falcon_h1/compiled"):
        exits, drawn, stood, rejected = modest_exits(family, tails=TAILS), set(), 0, 0
        for seed, prompt in enumerate(some_prompts(6)):
            sampling = Sampling(0.8, top_k=40, top_p=0.95, min_p=0.01, seed=seed, repetition_penalty=1.2)
            full = Engine(tiny(family), sampling=sampling).generate(prompt, max_tokens=16)
            engine = costing(Engine(tiny(family), exits, Policy((0.1,) * 3), "verify", sampling))
            answer = engine.generate(prompt, max_tokens=16)
            assert answer.ids == full.ids
            drawn |= set(answer.ids)
            stood += sum(token.exit_block < BLOCKS for token in answer.tokens)
            rejected += answer.tokens[-1].rejected
        assert len(drawn) > 12
        assert stood > 0 < rejected


def test_draws_follow_the_processed_probabilities() -> None:
    """A chi-square test over 20,000 draws, from 400 seeds at 50 places each."""
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 1.5, 0.2, -3.0])
    expected = (logits / 0.8).softmax(0)
    expected[7] = 0  # outside the top 7
    expected *= 20_000 / expected.sum()
    counts = torch.zeros(8)
    for seed in range(400):
        choose = Sampling(0.8, top_k=7, seed=seed).chooser()
        for place in range(50):
            counts[choose(logits, [0] * place)] += 1
    assert counts[7] == 0
    assert float(((counts - expected) ** 2 / expected)[:7].sum()) < 22.5  # 6 degrees of freedom: p = 0.001


@with_and_without_tails
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("family", ["llama/compiled", "qwen3/compiled", "mamba2/compiled", "falcon_h1"])
def test_a_sequence_in_a_batch_gets_its_answer_alone(family: str, size: int, fill: str, tails: tuple[int, ...]) -> None:
    if refused(fill, family):
        return
    keys = {"perhaps": (0.3, 0.3, 0.3), "keys": (0.05, 0.05, 0.02)} if tails else {}
    engine = Engine(
        tiny(family), modest_exits(family, tails=tails), Policy((0.6,) * 3 if tails else (0.4,) * 3, **keys), fill
    )
    prompts = some_prompts(size, seed=size)
    together = engine.generate_batch(prompts, max_tokens=8)
    equal = 0
    for prompt, answer in zip(prompts, together, strict=True):
        alone = engine.generate(prompt, max_tokens=8)
        assert same_or_tied(family, prompt, answer.ids, alone.ids)
        if answer.ids == alone.ids:
            equal += 1
            # How many drafts pay depends on how wide the chunk is.
            own = [token.exit_block for token in alone.tokens]
            assert fill == "verify" or [token.exit_block for token in answer.tokens] == own
    assert equal > size / 2  # a tie is rare


@pytest.mark.parametrize(("fill", "template"), [*((fill, False) for fill in FILLS), ("project", True)])
@pytest.mark.parametrize("family", ["llama", "llama/compiled", "gemma2", "mamba", "mamba2/compiled", "falcon_h1", "jamba"])
def test_what_prompts_begin_with_is_read_once_and_changes_no_answer(family, fill, template, monkeypatch) -> None:
    if refused(fill, family):
        return
    monkeypatch.setattr("offramp.decode.engine.SHARED", 8)
    engine = Engine(tiny(family), modest_exits(family, tails=TAILS if template else ()), Policy((0.4,) * 3), fill)
    start_a, start_b = ([index * 7 % 250 for index in range(start, start + 20)] for start in (1, 90))
    ends = some_prompts(5, seed=3)
    prompts = [start_a + ends[0][:6], start_a + ends[1][:9], ends[2], start_b + ends[3][:3], start_b[:15] + ends[4][:8]]
    talks = list(engine.shared_talks(prompts))
    assert [talk.sequence.run if talk.sequence else 0 for talk in talks] == [19, 19, 0, 14, 14]
    if template:
        prompts = [[*range(30, 60), *ids] for ids in prompts]
        talks = list(engine.shared_talks(prompts))
        assert [talk.sequence.run for talk in talks] == [49, 49, 29, 44, 44]
    together = engine.generate_batch(prompts, max_tokens=8)
    for prompt, answer in zip(prompts, together, strict=True):
        assert same_or_tied(family, prompt, answer.ids, engine.generate(prompt, max_tokens=8).ids)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "mamba2/compiled", "falcon_mamba", *HYBRIDS])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
@torch.inference_mode()
def test_a_watched_state_forgets_and_goes_on_as_if_it_had_never_known(family: str, data: st.DataObject) -> None:
    backbone = tiny(family)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    state, place = backbone.state(), 0

    def read(count: int) -> None:
        nonlocal place
        h, step = backbone.embed(ids[:, place : place + count], place)
        backbone.run(h, 0, BLOCKS, state, step)
        place += count

    for _ in range(data.draw(st.integers(0, 2))):
        read(data.draw(st.integers(1, 5)))
    start = place
    state.watch(0, BLOCKS)
    for _ in range(data.draw(st.integers(1, 4))):
        read(data.draw(st.integers(1, 5)))
        if data.draw(st.booleans()):
            place = data.draw(st.integers(start, place))
            state.crop(place)
    if place == start:
        read(1)
    state.settle()
    reference = backbone.state()
    h, step = backbone.embed(ids[:, :place])
    backbone.run(h, 0, BLOCKS, reference, step)
    for mine, whole in zip(state.ssm, reference.ssm, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.window, whole.window, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine.h, whole.h, rtol=1e-5, atol=1e-5)


def test_compiled_code_repeats_a_state_bit_for_bit() -> None:
    backbone, ids = tiny("mamba2/compiled"), torch.arange(12)[None]
    states = [backbone.state(), backbone.state()]
    with torch.inference_mode():
        for state, count in zip(states, (12, 7), strict=True):
            h, step = backbone.embed(ids[:, :2])
            backbone.run(h, 0, BLOCKS, state, step)
            state.watch(0, BLOCKS)
            h, step = backbone.embed(ids[:, 2:count], 2)
            backbone.run(h, 0, BLOCKS, state, step)
    states[0].crop(7)
    for mine, whole in zip(states[0].ssm, states[1].ssm, strict=True):
        assert torch.equal(mine.h, whole.h)
        assert torch.equal(mine.window, whole.window)


def test_an_unwatched_state_refuses_to_forget() -> None:
    ssm = SSM()
    ssm.record(3)
    with pytest.raises(ValueError, match="cannot forget"):
        ssm.crop(2)
    ssm.crop(3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature of -1"),
        ({"temperature": float("nan")}, "temperature of nan"),
        ({"top_k": -1}, "top-k of -1"),
        ({"top_p": 0}, "top-p of 0"),
        ({"min_p": 2}, "min-p of 2"),
    ],
)
def test_unusable_settings_get_a_sentence_and_a_hint(settings: dict[str, float], words: str) -> None:
    with pytest.raises(BadInput, match=words) as raised:
        Sampling(**settings)  # type: ignore[arg-type]
    assert raised.value.hint
