"""The decode loop: closed exits change nothing, open exits do what they say, and the books balance."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    HYBRIDS,
    LAYERS,
    MADE_AT_ONCE,
    PROMPT,
    TAILS,
    after,
    begun,
    damaged,
    exits_for,
    library_tokens,
    modest_exits,
    refused,
    same_or_tied,
    some_prompts,
    with_and_without_tails,
)
from models import BLOCKS, COMPILED, tiny
from offramp import Engine, Policy
from offramp.decode.detokenizer import WINDOW, Detokenizer
from offramp.decode.fills import FILLS
from offramp.decode.request import Decided, Finished, Prefilled, Talk
from offramp.decode.sampling import Sampling
from offramp.decode.sequence import Follower
from offramp.errors import BadInput, BadNumbers
from offramp.exits.gates import GATES
from offramp.exits.parts import ExitPart, Memory
from offramp.exits.policy import CONFIDENCES
from offramp.exits.readouts import READOUTS


def test_full_depth_equals_the_librarys_generate(family: str) -> None:
    assert Engine(tiny(family)).generate(PROMPT, max_tokens=24).ids == library_tokens(family, PROMPT, 24)


def test_closed_exits_equal_the_librarys_generate(family: str) -> None:
    engine = Engine(tiny(family), exits_for(family, tails=TAILS), Policy((1.0,) * 3))
    answer = engine.generate(PROMPT, max_tokens=24)
    assert answer.ids == library_tokens(family, PROMPT, 24)
    assert answer.flops_saved == 0
    assert all(token.exit_block == BLOCKS and token.confidence is None for token in answer.tokens)


@pytest.mark.parametrize("gate", GATES)
def test_exits_that_are_open_but_never_sure_do_not_change_the_tokens(gate: str) -> None:
    exits = exits_for("llama", gate)
    with torch.no_grad():
        for exit in exits:
            out = exit.gate.mixer.project_out if gate == "mamba" else exit.gate.out
            out.weight.zero_()
            out.bias.fill_(-5.0)
    answer = Engine(tiny("llama"), exits, Policy((0.9,) * 3)).generate(PROMPT, max_tokens=16)
    assert answer.ids == library_tokens("llama", PROMPT, 16)
    assert answer.flops_saved < 0  # gates and recurrent read-outs ran for nothing, and count


def test_the_repetition_penalty_is_the_librarys() -> None:
    plain, punished = (
        Engine(tiny("llama"), sampling=Sampling(repetition_penalty=p)).generate(PROMPT, max_tokens=24).ids
        for p in (1.0, 1.8)
    )
    assert plain != punished
    assert punished == library_tokens("llama", PROMPT, 24, repetition_penalty=1.8)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("family", "fill"), [("llama", "project"), ("llama", "copy"), ("mamba2", "freeze")])
def test_every_kind_of_exit_opens_and_reports(gate: str, readout: str, family: str, fill: str) -> None:
    exits, left = exits_for(family, gate, readout), 0
    for threshold in (0.5, 0.01):  # a random gate may be above the first nowhere
        answer = Engine(tiny(family), exits, Policy((threshold,) * 3), fill).generate(PROMPT, max_tokens=24)
        early = [token for token in answer.tokens if token.exit_block < BLOCKS]
        left += len(early)
        assert {token.exit_block for token in answer.tokens} <= {*LAYERS, BLOCKS}
        assert all(token.confidence is not None and threshold < token.confidence <= 1 for token in early)
        assert all(token.confidence is None for token in answer.tokens if token.exit_block == BLOCKS)
        assert answer.mean_blocks == sum(token.blocks for token in answer.tokens) / len(answer.tokens)
    assert left


@with_and_without_tails
@pytest.mark.parametrize("fill", MADE_AT_ONCE)
def test_wide_open_exits_take_the_first_one_for_every_family(family: str, fill: str, tails: tuple[int, ...]) -> None:
    if refused(fill, family):
        return
    exits = exits_for(family, "ffn", tails=tails)
    answer = Engine(tiny(family), exits, Policy((0.0,) * 3), fill).generate(PROMPT, max_tokens=12)
    assert {token.exit_block for token in answer.tokens} == {LAYERS[0]}
    assert {token.blocks for token in answer.tokens} == {LAYERS[0] + sum(tails[:1])}
    assert 0 < answer.flops_saved < 1


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_every_confidence_decides(confidence: str) -> None:
    exits = exits_for("llama")
    opened = Engine(tiny("llama"), exits, Policy((0.0,) * 3, confidence)).generate(PROMPT, max_tokens=8)
    closed = Engine(tiny("llama"), exits, Policy((0.999999,) * 3, confidence)).generate(PROMPT, max_tokens=8)
    assert opened.mean_blocks == LAYERS[0]
    assert closed.mean_blocks == BLOCKS


def test_a_fixed_block_asks_no_gate() -> None:
    exits = exits_for("llama", "ffn")
    answer = Engine(tiny("llama"), exits, Policy((1.0, 0.0, 1.0))).generate(PROMPT, max_tokens=8)
    gated = Engine(tiny("llama"), exits, Policy((1.0, 1e-9, 1.0))).generate(PROMPT, max_tokens=8)
    assert answer.mean_blocks == LAYERS[1]
    assert answer.ids == gated.ids
    assert answer.flops_saved > gated.flops_saved


def test_a_decay_makes_answers_begin_strictly() -> None:
    exits = exits_for("llama")
    policy = Policy((0.5, 0.6, 0.7), decay=6.0)
    answer = Engine(tiny("llama"), exits, policy).generate(PROMPT, max_tokens=24)
    early = [(place, token) for place, token in enumerate(answer.tokens) if token.exit_block < BLOCKS]
    assert early
    assert all(token.confidence > policy.threshold(LAYERS.index(token.exit_block), place) for place, token in early)
    assert any(token.confidence <= policy.threshold(LAYERS.index(token.exit_block), 0) for _, token in early)
    # The first token's threshold is 0.9 λ + 0.1: the prompt's tokens do not count.
    strict = Engine(tiny("llama"), exits, Policy((0.55, 0.64, 0.73))).generate(PROMPT, max_tokens=1)
    assert strict.tokens == answer.tokens[:1]


@pytest.mark.parametrize("run", [1, 2, 3])
def test_patience_leaves_where_so_many_exits_on_end_agree(run: int) -> None:
    backbone, exits = tiny("llama"), exits_for("llama", readout="none")
    left = set()
    for seed in range(40):
        ids = torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        fixed = [Policy(tuple(float(other != exit) for other in range(3))) for exit in range(3)]
        tokens = [Engine(backbone, exits, policy).generate(ids, max_tokens=1).ids[0] for policy in fixed]
        wanted = next((LAYERS[end] for end in range(run - 1, 3) if len(set(tokens[end - run + 1 : end + 1])) == 1), BLOCKS)
        answer = Engine(backbone, exits, Policy(((run - 0.5) / 3,) * 3, "patience")).generate(ids, max_tokens=1)
        assert answer.tokens[0].exit_block == wanted
        left.add(wanted)
    assert left == {LAYERS[0]} if run == 1 else len(left) > 1


@torch.inference_mode()
def test_a_token_that_leaves_gets_the_read_outs_logits_and_fills_the_skipped_blocks() -> None:
    """One step, recomputed by hand from the parts."""
    backbone, exits = tiny("llama"), exits_for("llama", "linear", "linear")
    ids = backbone.prompts.encode(PROMPT)
    answer = Engine(backbone, exits, Policy((1.0, 0.0, 1.0))).generate(ids, max_tokens=2)
    state, exit = backbone.state(), list(exits)[1]
    chosen = []
    h, step = backbone.embed(torch.tensor([ids[:-1]]))
    backbone.run(h, 0, BLOCKS, state, step)
    for position, token in enumerate([ids[-1], answer.ids[0]], len(ids) - 1):
        h, step = backbone.embed(torch.tensor([[token]]), position)
        h = backbone.run(h, 0, exit.block, state, step)
        chosen.append(int(backbone.logits(exit.adapter(h)[0]).argmax()))
        backbone.project(h, exit.block, BLOCKS, state, step)
    assert answer.ids == chosen


@torch.inference_mode()
def test_copy_gives_skipped_blocks_the_last_computed_blocks_keys_and_values() -> None:
    backbone, exits = tiny("llama"), exits_for("llama")
    engine = Engine(backbone, exits, Policy((0.0, 1.0, 1.0)), "copy")
    blocks = after(engine, 1).state.kv
    for skipped in blocks[LAYERS[0] :]:
        assert torch.equal(skipped.keys[:, :, -1], blocks[LAYERS[0] - 1].keys[:, :, -1])
        assert torch.equal(skipped.values[:, :, -1], blocks[LAYERS[0] - 1].values[:, :, -1])


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba", *HYBRIDS])
@pytest.mark.parametrize("fill", ["project", "copy", "freeze"])
@torch.inference_mode()
def test_what_skipped_blocks_remember_in_mamba_models_and_hybrids(family: str, fill: str) -> None:
    """Only `project` updates Mamba states. Attention has keys and values for every position with any fill."""
    backbone = tiny(family)
    engine = Engine(backbone, exits_for(family), Policy((1.0, 0.0, 1.0)), fill)
    batch, sequence = begun(engine)
    before = [None if ssm is None else (ssm.window.clone(), ssm.h.clone()) for ssm in sequence.state.ssm]
    batch.step()
    for block, (ssm, kv) in enumerate(zip(sequence.state.ssm, sequence.state.kv, strict=True)):
        if ssm is not None:
            moved = not torch.equal(ssm.h, before[block][1])
            assert moved == (block < LAYERS[1] or fill == "project")
            assert moved != torch.equal(ssm.window, before[block][0])
        if kv is not None:
            assert kv.length == len(sequence.ids) - 1


@torch.inference_mode()
def test_copy_in_a_hybrid_takes_the_last_attention_block_that_was_computed() -> None:
    backbone = tiny("bamba")  # attention in blocks 1 and 4
    engine = Engine(backbone, exits_for("bamba"), Policy((1.0, 0.0, 1.0)), "copy")
    sequence = after(engine, 1)
    newest = [kv.keys[:, :, -1] for kv in sequence.state.kv if kv is not None]
    assert torch.equal(newest[0], newest[1])


def test_copy_is_refused_where_shapes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny("llama")
    monkeypatch.setattr(backbone, "kv_shape", lambda index: (2, 8 + index % 2))
    with pytest.raises(BadInput, match="same key and value shape") as raised:
        Engine(backbone, fill="copy")
    assert "project" in raised.value.hint


@settings(max_examples=15, deadline=None)
@given(
    threshold=st.floats(0.05, 0.95),
    fill=st.sampled_from(sorted(MADE_AT_ONCE)),
    seed=st.integers(0, 20),
    tails=st.sampled_from([(), TAILS]),
    keys=st.sampled_from([{}, {"perhaps": (0.0,) * 3, "keys": (0.2, 0.1, 0.05)}]),
)
def test_flops_add_up_and_skipped_blocks_never_fall_behind(threshold, fill, seed, tails, keys) -> None:
    family = "falcon_h1" if fill == "freeze" else "llama"
    backbone = tiny(family)
    engine = Engine(backbone, exits_for(family, seed=seed, tails=tails), Policy((threshold,) * 3, **keys), fill)
    answer = engine.generate(PROMPT, max_tokens=10)
    total = 0
    for token in answer.tokens:
        total += token.flops
        assert token.cumulative_flops == total
    prompt = len(backbone.prompts.encode(PROMPT))
    full = sum(engine.plan.costs.full(prompt + index) for index in range(len(answer.tokens)))
    assert answer.flops_saved == pytest.approx(1 - total / full)
    batch, sequence = begun(engine)
    for _ in range(4):
        batch.step()
        assert {sequence.state.length(block) for block in range(BLOCKS)} == {len(sequence.ids) - 1}


def test_a_recurrent_gate_decodes_as_it_would_read_the_whole_text(monkeypatch) -> None:
    """Gates that never open see each token once, in order. Their confidences equal those of one pass over the text."""
    backbone, exits = tiny("llama"), exits_for("llama")
    engine = Engine(backbone, exits, Policy((0.9999999,) * 3))
    seen: list[float] = []
    read = Follower.read

    def spied(follower: Follower) -> tuple[torch.Tensor, int]:
        out, flops = read(follower)
        if out.numel() == 1:  # a gate's output
            seen.append(float(out.sigmoid()))
        return out, flops

    monkeypatch.setattr(Follower, "read", spied)
    ids = backbone.prompts.encode(PROMPT)
    answer = engine.generate(ids, max_tokens=12)
    assert {token.exit_block for token in answer.tokens} == {BLOCKS}
    with torch.inference_mode():
        h, step = backbone.embed(torch.tensor([ids + answer.ids[:-1]]))
        state, start, whole = backbone.state(), 0, []
        for exit in exits:
            h = backbone.run(h, start, exit.block, state, step)
            start = exit.block
            whole.append(exit.gate(h)[0][0].sigmoid()[len(ids) - 1 :])
    torch.testing.assert_close(torch.tensor(seen).view(-1, 3), torch.stack(whole, 1), rtol=1e-4, atol=1e-5)


def test_generation_stops_at_the_end_of_text_token() -> None:
    backbone = tiny("llama")
    free = Engine(backbone).generate(PROMPT, max_tokens=24)
    stop = free.ids[5]
    ending = free.ids.index(stop)
    backbone.model.generation_config.eos_token_id = [257, stop]
    try:
        answer = Engine(backbone).generate(PROMPT, max_tokens=24)
    finally:
        backbone.model.generation_config.eos_token_id = 257
    assert answer.ids == free.ids[: ending + 1]
    assert (answer.finish_reason, free.finish_reason) == ("stop", "length")


def test_a_stop_string_ends_the_text_before_it() -> None:
    free = Engine(tiny("llama")).generate(PROMPT, max_tokens=24)
    stop = free.text[4:6]
    answer = Engine(tiny("llama")).generate(PROMPT, max_tokens=24, stop=(stop,))
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish_reason == "stop"


class Bytes:
    """A tokenizer for `Text`: one token a byte."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@settings(deadline=None)
@given(
    text=st.text(max_size=120) | st.text("ab", max_size=120),
    stop=st.lists(st.text(min_size=1, max_size=4) | st.text("ab", min_size=1, max_size=9), max_size=2),
)
def test_streamed_pieces_are_the_text_up_to_the_first_stop_string(text: str, stop: list[str]) -> None:
    streamed, pieces = Detokenizer(Bytes(), tuple(stop)), []
    raw = text.encode()
    for index, byte in enumerate(raw):
        pieces.append(streamed.push(byte, last=index == len(raw) - 1))
        assert "\ufffd" not in pieces[-1] or "\ufffd" in text
        if streamed.stopped:
            break
    whole = "".join(pieces)
    assert text.startswith(whole)
    if streamed.stopped:
        assert any(text[len(whole) :].startswith(string) for string in stop)
        assert not any(string in whole for string in stop)
    else:
        assert whole == text
        assert not any(string in text for string in stop)


def test_a_long_prompt_and_short_ones_do_not_hold_up_each_other(monkeypatch) -> None:
    monkeypatch.setattr("offramp.decode.batch.PIECE", 4)
    monkeypatch.setattr("offramp.decode.batch.MOST_READ", 4)
    batch = Engine(tiny("llama")).batch()
    read, steps = [], 0
    long = batch.add([65] * 100, max_tokens=1)
    while long not in read:
        if steps % 2 == 0:
            batch.add([66] * 5, max_tokens=1)  # as many as there is time to read
        read += [event.request for event in batch.step() if isinstance(event, Prefilled)]
        steps += 1
    assert len(read) - 1 >= 10
    assert steps < 200


@pytest.mark.parametrize("byte", [b"x", b"\xff"])  # a letter, and a byte that is never part of a character
def test_nothing_is_kept_of_text_that_was_sent(byte: bytes) -> None:
    streamed, kept = Detokenizer(Bytes(), ("xyz" * 9,)), []
    for _ in range(2000):
        streamed.push(byte[0], last=False)
        kept.append(len(pickle.dumps(streamed)))
    assert max(kept) == max(kept[:100])


class Words:
    """A tokenizer for single characters that, as Llama's does, leaves out a space at the beginning."""

    def __init__(self) -> None:
        self.most = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.most = max(self.most, len(ids))
        return "".join(chr(id) for id in ids if id).removeprefix(" ")


@settings(deadline=None)
@given(text=st.text(alphabet=" ab\x00", max_size=150))
def test_a_long_text_is_decoded_in_short_windows(text: str) -> None:
    tokenizer = Words()
    streamed = Detokenizer(tokenizer, ())
    pieces = [streamed.push(ord(character), last=False) for character in text]
    assert tokenizer.most <= 2 * WINDOW + text.count(" ") + text.count("\x00")
    assert "".join(pieces) == tokenizer.decode([ord(character) for character in text], True)


def test_nan_logits_are_named_not_decoded() -> None:
    with pytest.raises(BadNumbers, match="NaN"):
        Engine(damaged(tiny("llama"))).generate(PROMPT, max_tokens=4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda b: Engine(b, fill="magic"), "no fill 'magic'"),
        (lambda b: Engine(b, exits_for("llama"), Policy((0.5,))), "do not fit"),
        (lambda b: Engine(b, sampling=Sampling(repetition_penalty=0)), "not positive"),
        (lambda b: Engine(b, fill="defer", max_pending=0), "must be able to wait"),
        (lambda b: Engine(b).generate(PROMPT, max_tokens=0), "0 tokens"),
        (lambda b: Engine(b).generate([], max_tokens=4), "empty"),
        (lambda b: Engine(b).generate([1] * 512, max_tokens=4), "512 tokens long"),
    ],
)
def test_unusable_input_gets_a_sentence_and_a_hint(make, words: str) -> None:
    with pytest.raises(BadInput, match=words) as raised:
        make(tiny("llama"))
    assert raised.value.hint


def test_an_answer_ends_where_the_context_does() -> None:
    answer = Engine(tiny("llama")).generate([65] * 508, max_tokens=100)
    assert len(answer.tokens) == 4


class Counter(ExitPart):
    """A gate that opens at every third token. It must be given every token, in order."""

    recurrent = True

    def forward(self, h: torch.Tensor, memory: Memory = None) -> tuple[torch.Tensor, Memory]:
        before = torch.zeros(1) if memory is None else memory[0]
        numbers = before + torch.arange(1, h.shape[1] + 1)
        opens = torch.where(numbers % 3 == 0, 9.0, -9.0)[None]
        return opens, (numbers[-1:], torch.empty(0))


def test_a_gate_with_a_memory_keeps_it_because_its_class_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    exits = exits_for("llama")
    for exit in exits:
        exit.gate = Counter()
    ids = tiny("llama").prompts.encode(PROMPT)
    answer = Engine(tiny("llama"), exits, Policy((1.0, 0.5, 1.0))).generate(ids, max_tokens=12)
    # The gate has counted the prompt; token t of the answer is computed from text of len(ids) + t tokens.
    opened = [(len(ids) + place) % 3 == 0 for place in range(12)]
    assert [token.exit_block == LAYERS[1] for token in answer.tokens] == opened
    monkeypatch.setattr(Counter, "recurrent", False)
    with pytest.raises(TypeError, match="recurrent = True"):
        Engine(tiny("llama"), exits, Policy((1.0, 0.5, 1.0))).generate(ids, max_tokens=2)


@pytest.mark.parametrize("family", ["llama", "mamba2/compiled"])
@torch.inference_mode()
def test_a_deep_read_out_reads_the_token_before_and_not_one_that_waited(family: str) -> None:
    backbone, exits = tiny(family), modest_exits(family, readout="deep")
    for exit in exits:
        exit.gate = Counter()
    batch, sequence = begun(Engine(backbone, exits, Policy((1.0, 0.5, 1.0)), "defer"))
    taken_along = 0
    for _ in range(12):
        waited = sequence.pending
        batch.step()
        if sequence.pending:
            continue
        taken_along += waited
        h, step = backbone.embed(torch.tensor([sequence.ids[:-1]]))
        top = backbone.run(h, 0, BLOCKS, backbone.state(), step)[:, -1:]
        torch.testing.assert_close(sequence.deep, top, rtol=1e-4, atol=1e-4)
    assert taken_along


@with_and_without_tails
@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled", "bamba"])
@pytest.mark.parametrize("fill", FILLS)
def test_requests_join_and_leave_between_steps_and_change_no_other_answer(family, fill, tails) -> None:
    if refused(fill, family):
        return
    engine = Engine(tiny(family), modest_exits(family, tails=tails), Policy((0.4,) * 3), fill)
    prompts = some_prompts(3, seed=4)
    alone = [engine.generate(prompt, max_tokens=20).ids for prompt in prompts]
    batch = engine.batch()
    first, second = (batch.add(prompt, max_tokens=20) for prompt in prompts[:2])
    for _ in range(2):
        batch.step()
    batch.cancel(second)
    third = batch.add(prompts[2], max_tokens=20)
    events = list(batch.run())
    assert [type(event) for event in events if event.request is third][:2] == [Prefilled, Decided]
    assert not any(event.request is second for event in events)
    assert second.finish_reason == "cancelled"
    assert 0 < len(second.tokens) < 20
    for request, prompt, ids in ((first, prompts[0], alone[0]), (third, prompts[2], alone[2])):
        assert same_or_tied(family, prompt, [token.id for token in request.tokens], ids)
        assert isinstance(events[-1], Finished)
        assert request.finish_reason in ("stop", "length")


def test_two_streams_of_one_engine_do_not_mix() -> None:
    engine = Engine(tiny("llama"), exits_for("llama"), Policy((0.5,) * 3))
    wanted = [engine.generate(prompt, max_tokens=8).ids for prompt in ("Some words", "Other ones")]
    streams = [engine.stream(prompt, max_tokens=8) for prompt in ("Some words", "Other ones")]
    in_turn = [[token.id for token in pair] for pair in zip(*streams, strict=True)]
    assert [list(ids) for ids in zip(*in_turn, strict=True)] == wanted


def test_an_answer_that_fills_the_context_ends_for_its_length() -> None:
    backbone = tiny("llama")
    prompt = some_prompts(1)[0]
    room = backbone.context - 5
    answer = Engine(backbone).generate((prompt * 512)[:room], max_tokens=9)
    assert (len(answer.tokens), answer.finish_reason) == (5, "length")


class Fails:
    """Chooses the most probable token, and fails once, at its n-th call."""

    def __init__(self, call: int) -> None:
        self.calls, self.call = 0, call

    def __call__(self, logits: torch.Tensor, ids: list[int]) -> int:
        self.calls += 1
        if self.calls == self.call:
            raise RuntimeError("the chooser failed")
        return int(logits.argmax())


@pytest.mark.parametrize("fill", ["project", "defer", "verify"])
@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled"])
def test_a_failed_step_ends_the_batch_and_a_talk_starts_anew(family: str, fill: str) -> None:
    prompt, failures = some_prompts(1, seed=2)[0], 0
    for call in range(1, 8):
        engine = Engine(tiny(family), modest_exits(family, tails=TAILS), Policy((0.4,) * 3), fill, Fails(call))
        batch, talk = engine.batch(), Talk()
        request = batch.add(prompt, talk, max_tokens=12)
        neighbour = batch.add(some_prompts(1, seed=3)[0], max_tokens=12)
        with pytest.raises(RuntimeError, match="the chooser failed"):
            list(batch.run())
        failures += 1
        assert not batch.requests
        assert request.finish_reason == neighbour.finish_reason == "failed"
        more = [*talk.sequence.ids, *some_prompts(1, seed=5)[0]]
        again = [token.id for token in engine.stream(more, talk, max_tokens=12)]
        assert again == engine.generate(more, max_tokens=12).ids
    assert failures == 7


def test_a_talk_goes_on_only_where_its_memory_fits() -> None:
    backbone, exits = tiny("llama"), modest_exits("llama")
    wide, narrow = (Engine(backbone, exits, Policy(thresholds), "defer") for thresholds in ((0.4,) * 3, (1.0, 0.4, 1.0)))
    prompt, talk = some_prompts(1, seed=2)[0], Talk()
    first = [token.id for token in wide.stream(prompt, talk, max_tokens=8)]
    more = [*prompt, *first, 65, 66]
    answer = [token.id for token in narrow.stream(more, talk, max_tokens=8)]
    assert answer == narrow.generate(more, max_tokens=8).ids
    batch = narrow.batch()
    batch.add(more, talk)
    with pytest.raises(BadInput, match="Another request"):
        batch.add(more, talk)


def test_mistakes_in_a_request_are_named() -> None:
    engine = Engine(tiny("llama"))
    with pytest.raises(TypeError, match="max_token"):
        engine.generate(PROMPT, max_token=3)  # type: ignore[call-arg]
    with pytest.raises(BadInput, match="stop texts"):
        engine.generate(PROMPT, stop="ab")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="has 260 tokens"):
        engine.generate([1, 260])
    with pytest.raises(ValueError, match="no tokens"):
        engine.summarise(engine.batch().add([1, 2]), 0.1, 0.1)


@pytest.mark.parametrize("variant", ["llama", *(["llama/compiled"] if COMPILED else [])])
def test_a_talk_forgets_tokens_that_nobody_took_and_keeps_the_rest(variant: str) -> None:
    """A stream that is left early may have decided more. Only attention can forget."""
    engine, talk, prompt = Engine(tiny(variant)), Talk(), list(range(1, 30))
    taken = list(itertools.islice(engine.stream(prompt, talk, max_tokens=60, end_ids=frozenset()), 5))
    ids = [*prompt, *(token.id for token in taken), 7, 8, 9]
    sequence = talk.sequence
    answer = [token.id for token in engine.stream(ids, talk, max_tokens=6, end_ids=frozenset())]
    assert talk.sequence is sequence
    assert answer == engine.generate(ids, max_tokens=6, end_ids=frozenset()).ids
