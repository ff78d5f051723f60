"""A block's memory behaves like a plain concatenation, and every block has its own length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import TAILS, exits_for
from models import compiled_only, tiny
from offramp import Engine, Policy
from offramp.decode.request import Talk
from offramp.model.state import KV, State

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 7)),
        st.tuples(st.just("crop"), st.integers(0, 20)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    ),
    max_size=15,
)


def random_tokens(batch, tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, tokens, 3, generator=g), torch.randn(batch, 2, tokens, 3, generator=g)


def same(kv, keys, values):
    return kv.length == keys.shape[2] and torch.equal(kv.keys, keys) and torch.equal(kv.values, values)


@settings(max_examples=40, deadline=None)
@given(OPERATIONS, st.integers(1, 9))
def test_a_memory_equals_a_plain_concatenation_after_any_operations(operations, capacity):
    kv = KV(capacity)
    keys, values = random_tokens(2, 0)
    stored = False
    for seed, (name, argument) in enumerate(operations):
        if name == "append":
            new_keys, new_values = random_tokens(keys.shape[0], argument, seed)
            kv.append(new_keys, new_values)
            keys, values = torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2)
            stored = True
        elif name == "crop":
            kv.crop(argument)
            keys, values = keys[:, :, :argument], values[:, :, :argument]
        elif stored:
            rows = torch.tensor([row % keys.shape[0] for row in argument])
            kv.select(rows)
            keys, values = keys[rows], values[rows]
        assert same(kv, keys, values) if stored else kv.length == 0


def test_a_memory_of_another_batch_is_refused():
    kv = KV()
    kv.append(*random_tokens(2, 3))
    for batch in (1, 3):
        with pytest.raises(ValueError, match="the memory holds"):
            kv.append(*random_tokens(batch, 1))
    assert kv.length == 3


def test_a_memory_grows_once_to_what_was_reserved():
    state = State(["attention"], capacity=2)
    kv, token = state.kv[0], torch.ones(1, 1, 1, 4)
    kv.append(token, token)
    state.reserve(50)
    kv.append(token, token)
    kv.append(token, token)
    grown = kv.keys.data_ptr()
    for _ in range(47):
        kv.append(token, token)
    assert kv.keys.data_ptr() == grown
    assert torch.equal(kv.values, torch.ones(1, 1, 50, 4))


def test_a_memory_grows_past_its_capacity_and_keeps_what_it_held():
    kv = KV(capacity=2)
    pieces = [random_tokens(1, tokens, seed=tokens) for tokens in (1, 1, 1, 5, 40)]
    for piece in pieces:
        kv.append(*piece)
    assert same(kv, *(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)))


def test_an_empty_memory_can_be_cropped_and_selected_from():
    kv = KV()
    kv.crop(0)
    kv.select(torch.tensor([0]))
    assert kv.length == 0


def test_a_memory_keeps_a_copy_of_what_it_was_given():
    kv = KV()
    keys, values = random_tokens(1, 2)
    kv.append(keys, values)
    before = keys.clone()
    keys.zero_()
    assert torch.equal(kv.keys, before)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=12), st.integers(0, 12))
def test_every_block_has_a_length_of_its_own(updates, cut):
    state = State(["attention"] * 3, capacity=2)
    lengths = [0, 0, 0]
    for block, tokens in updates:
        keys, values = state.update(*random_tokens(1, tokens), block)
        lengths[block] += tokens
        assert keys.shape[2] == values.shape[2] == lengths[block]
        assert [state.length(index) for index in range(3)] == lengths
    state.crop(cut)
    assert [state.length(index) for index in range(3)] == [min(length, cut) for length in lengths]


def test_an_update_gives_back_all_that_the_block_remembers_and_no_other_block_does():
    state = State(["attention", "attention"])
    first, second, other = random_tokens(1, 3, seed=1), random_tokens(1, 2, seed=2), random_tokens(1, 4, seed=3)
    state.update(*first, 0)
    state.update(*other, 1)
    keys, values = state.update(*second, 0, None, anything="ignored")
    assert torch.equal(keys, torch.cat([first[0], second[0]], dim=2))
    assert torch.equal(values, torch.cat([first[1], second[1]], dim=2))


def test_selected_rows_are_kept_in_their_order_in_every_block():
    state = State(["attention", "attention", "attention"])
    held = [random_tokens(3, 4, seed=1), random_tokens(3, 6, seed=2)]
    for block, piece in enumerate(held):
        state.update(*piece, block)
    rows = torch.tensor([2, 0, 2])
    state.select(rows)
    for block, (keys, values) in enumerate(held):
        assert same(state.kv[block], keys[rows], values[rows])
    assert state.length(2) == 0


def test_copies_of_a_row_go_separate_ways():
    state = State(["attention"])
    state.update(*random_tokens(1, 3), 0)
    state.select(torch.tensor([0, 0]))
    keys, values = random_tokens(2, 1, seed=9)
    all_keys, _ = state.update(keys, values, 0)
    assert torch.equal(all_keys[0, :, :3], all_keys[1, :, :3])
    assert torch.equal(all_keys[:, :, 3:], keys)


def test_a_kind_of_block_without_a_memory_is_refused():
    with pytest.raises(NotImplementedError, match="granular"):
        State(["attention", "granular"])


@compiled_only
@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_keeps_few_tokens_and_changes_nothing(family, drafts):
    """Compiled blocks let go of what no token sees any more, with drafts that are taken back; the library's keep all."""
    exits, policy, talks = exits_for(f"{family}/compiled", "ffn", "ffn", tails=TAILS), Policy((0.5, 0.6, 0.5)), []
    answers = []
    for engine in (
        Engine(tiny(family)),
        Engine(tiny(f"{family}/compiled"), exits, policy, "verify") if drafts else Engine(tiny(f"{family}/compiled")),
    ):
        talks.append(Talk())
        if engine.steppers.compiled:
            engine.steppers.compiled._burst = 8  # a call makes room for all that it decides
        answers.append([token.id for token in engine.stream([*range(40)], talks[-1], max_tokens=400, end_ids=frozenset())])
    assert answers[0] == answers[1]
    whole, slid = (talk.sequence.state for talk in talks)
    length = min(whole.length(0), slid.length(0))
    for window, kept, few in zip(tiny(family).modules.windows, whole.kv, slid.kv, strict=True):
        assert few.first >= 128 if window else few.first == 0
        seen = few.values[:, :, : length - few.first]
        torch.testing.assert_close(seen, kept.values[:, :, few.first : length], rtol=0, atol=1e-4)


@compiled_only
def test_a_talk_that_a_window_has_slid_past_is_read_again():
    engine, talk, prompt = Engine(tiny("mistral/compiled")), Talk(), list(range(1, 30))
    for _ in engine.stream(prompt, talk, max_tokens=400, end_ids=frozenset()):
        pass
    with pytest.raises(ValueError, match="no longer has the keys"):
        talk.sequence.state.crop(40)
    other = [*prompt, 7, 8, 9]
    answer = [token.id for token in engine.stream(other, talk, max_tokens=6, end_ids=frozenset())]
    assert answer == engine.generate(other, max_tokens=6, end_ids=frozenset()).ids
