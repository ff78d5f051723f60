"""Exits with tails: a token that jumps runs the model's last blocks, and training sees what decoding does."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from helpers import LAYERS, PROMPT, TAILS, costing, exits_for, library_tokens, modest_exits, same_or_tied, some_prompts
from models import BLOCKS, COMPILED, HIDDEN, LLAMA, tiny
from offramp import Engine, Exits, ExitsConfig, Policy
from offramp.decode.request import Talk
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput, OfframpError
from offramp.exits.readouts import READOUTS
from offramp.training.harm import CHANGES, harms
from offramp.training.tails import Jumped, drawn_exits, first_tail, through_tails
from offramp.training.teacher import TeacherText

COMPILED_TWO = ["llama/compiled", "mamba2/compiled"] if COMPILED else []


@torch.inference_mode()
def hidden_at(family: str, ids: list[int]) -> dict[int, torch.Tensor]:
    """The hidden states (1, T, D) of a text after each number of blocks."""
    backbone = tiny(family)
    h, step = backbone.embed(torch.tensor([ids]))
    state, at = backbone.state(), {0: h}
    for block in range(BLOCKS):
        h = at[block + 1] = backbone.run(h, block, block + 1, state, step)
    return at


@torch.inference_mode()
def test_a_token_jumps_in_training_as_in_decoding(family: str) -> None:
    backbone, exits = tiny(family), modest_exits(family, readout="ffn", tails=TAILS)
    for exit, index in zip(list(exits)[:2], range(2), strict=True):
        thresholds = [1.0] * 3
        thresholds[index] = 0.0
        ids, talk = some_prompts(1, seed=index)[0] * 2, Talk()
        list(Engine(backbone, exits, Policy(tuple(thresholds))).stream(ids, talk, max_tokens=1))
        at = hidden_at(family, ids)
        where = torch.zeros(1, len(ids), dtype=torch.bool)
        where[0, -1] = True
        adapted, _ = exit.adapter(at[exit.block][where][None].float())
        jumped = Jumped(exit, where, adapted[0])
        top = through_tails(backbone, backbone.runtime, at[BLOCKS - exit.tail], [jumped])
        torch.testing.assert_close(top[0, -1], talk.sequence.deep[0, -1].to(top), rtol=1e-4, atol=1e-4)
        # The other tokens stay exact.
        torch.testing.assert_close(top[0, :-1], at[BLOCKS][0, :-1], rtol=1e-4, atol=1e-4)


def test_gradients_pass_through_the_same_blocks(family: str) -> None:
    backbone, exits = tiny(family), modest_exits(family, readout="ffn", tails=TAILS)
    at, start = hidden_at(family, list(range(40, 60))), first_tail(exits, BLOCKS)
    where = drawn_exits(torch.ones(1, 20, dtype=torch.bool), 2, 0.8, torch.Generator().manual_seed(0))
    assert start == BLOCKS - max(TAILS)
    assert {int(index) for index in where.unique()} == {-1, 0, 1}
    made = [torch.randn(int((where == index).sum()), HIDDEN) + at[start].mean() for index in range(2)]
    adapted = [h.requires_grad_() for h in made]
    jumps = [Jumped(exit, where == index, h) for index, (exit, h) in enumerate(zip(list(exits)[:2], adapted, strict=True))]
    runtime = backbone.trainable_from(start)
    top = through_tails(backbone, runtime, at[start].clone(), jumps)
    with torch.inference_mode():
        inferred = through_tails(backbone, backbone.runtime, at[start], jumps)
    torch.testing.assert_close(top.detach(), inferred, rtol=1e-4, atol=1e-4)
    top.square().mean().backward()
    for h in adapted:
        assert h.grad is not None
        assert (h.grad.abs().amax(-1) > 0).all()


def test_a_second_key_that_says_no_changes_nothing_but_the_cost(family: str) -> None:
    exits = modest_exits(family, readout="ffn", tails=TAILS)
    never = Policy((1.0,) * 3, perhaps=(0.0,) * 3, keys=(0.9999,) * 3)
    for prompt in some_prompts(2, seed=3):
        answer, full = (
            Engine(tiny(family), *arguments).generate(prompt, max_tokens=12) for arguments in ((exits, never), ())
        )
        assert same_or_tied(family, prompt, answer.ids, full.ids)
        assert {token.blocks for token in answer.tokens} == {BLOCKS + sum(TAILS)}
        assert {token.exit_block for token in answer.tokens} == {BLOCKS}
        assert answer.flops_saved < 0


def test_gate_and_key_decide_together() -> None:
    exits = exits_for("llama", tails=TAILS)
    policy = Policy((0.8,) * 3, perhaps=(0.3,) * 3, keys=(0.02,) * 3)
    engine, seen = Engine(tiny("llama"), exits, policy), set()
    for prompt in some_prompts(8):
        for token in engine.generate(prompt, max_tokens=16).tokens:
            if token.exit_block < BLOCKS:
                index = LAYERS.index(token.exit_block)
                seen.add("gate" if token.confidence > 0.8 else "key")
                assert token.confidence > 0.02
                assert token.blocks >= token.exit_block + TAILS[index]
            else:
                seen.add("full depth")
    assert seen == {"gate", "key", "full depth"}
    assert policy.describe("mamba").startswith("mamba, 0.8 or 0.3+0.02")
    assert Policy.from_json({"thresholds": [0.5]}) == Policy((0.5,))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"perhaps": (0.1,), "keys": (0.5,)}, "do not fit 2"),
        ({"perhaps": (0.1, 0.1), "keys": (0.5, 0.5), "confidence": "max-prob"}, "does not go with"),
        ({"perhaps": (0.1, 0.1), "keys": (0.5, 0.5), "key": "gate"}, "does not go with"),
        ({"perhaps": (0.1, 0.1), "keys": (0.5, 2.0)}, "threshold of 2"),
        ({"exit_candidates": -1}, "-1 candidates"),
    ],
)
def test_policies_that_make_no_sense_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        Policy((0.5, 0.5), **arguments)
    assert caught.value.hint


@pytest.mark.parametrize("tails", [(1, 1), (5, 1, 0), (1, 3, 0), (1, 1, -1)])
def test_tails_that_do_not_fit_are_refused(tails: tuple[int, ...]) -> None:
    with pytest.raises(OfframpError, match="do not fit exits") as caught:
        Exits.new(tiny("llama"), ExitsConfig(LAYERS, tails=tails))
    assert caught.value.hint


@pytest.mark.parametrize("readout", READOUTS)
def test_exits_with_tails_are_saved_and_loaded(tmp_path, readout: str) -> None:
    exits = exits_for("llama", readout=readout, tails=TAILS)
    exits.policy = Policy((0.5,) * 3, perhaps=(0.2,) * 3, keys=(0.1,) * 3, exit_candidates=0)
    exits.save(tmp_path)
    loaded = Exits.load(tmp_path, tiny("llama"))
    assert (loaded.config, loaded.policy) == (exits.config, exits.policy)
    assert [exit.tail for exit in loaded] == list(TAILS)


@pytest.mark.parametrize("family", ["llama", *COMPILED_TWO])
def test_blocks_count_what_ran_for_deferred_and_rejected_tokens(family: str) -> None:
    exits = modest_exits(family, tails=TAILS)
    answer = Engine(tiny(family), exits, Policy((0.0, 1.0, 1.0)), "defer", max_pending=3).generate(PROMPT, max_tokens=8)
    # Three tokens leave after block 1 and run two blocks of their tail; the fourth runs its own and their deep blocks.
    assert [token.blocks for token in answer.tokens] == [3, 3, 3, 1 + 4 * 5] * 2
    verified = costing(Engine(tiny(family), exits, Policy((0.3,) * 3), "verify", lookup=0))
    for prompt in some_prompts(4):
        answer = verified.generate(prompt, max_tokens=16)
        rejected = answer.tokens[-1].rejected
        tokens = len(answer.tokens) + rejected - 1  # at least so many ran at full depth; the last one's place never does
        assert sum(token.blocks for token in answer.tokens) >= BLOCKS * tokens - (BLOCKS - 1) * rejected


def test_other_use_than_the_calibrated_one_is_noted_once() -> None:
    exits = exits_for("llama", gate="linear", readout="none")
    exits.policy = Policy((0.5,) * 3)
    exits.calibration = {"fill": "project", "weights": "float32", "max_tokens": 16, "raw": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine(tiny("llama"), exits)
        engine.generate("Hi", max_tokens=16)
        engine.plan.check_use(16, raw=False)
        Engine(tiny(LLAMA), exits, fill="verify", sampling=Sampling(0.7)).generate("Hi", max_tokens=20)
    with pytest.warns(UserWarning, match="answers of at most 16 tokens, not 20"):
        engine.generate("Hi", max_tokens=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate("Hi", max_tokens=20)
    with pytest.warns(UserWarning, match="the model's chat template"):
        Engine(tiny("llama"), exits).plan.check_use(8, raw=True)
    with pytest.warns(UserWarning, match=r"temperature 0.0, not 0.7 and repetition penalty 1.0, not 1.2"):
        Engine(tiny("llama"), exits, sampling=Sampling(0.7, repetition_penalty=1.2))


def test_a_sketch_at_exits_only_leaves_full_depth_as_it_is() -> None:
    from helpers import sketched

    exits = sketched("llama", dims=8)
    closed = Policy((1.0,) * 3, exit_candidates=16)
    assert Engine(tiny("llama"), exits, closed).generate(PROMPT, max_tokens=12).ids == library_tokens("llama", PROMPT, 12)
    opened = Engine(tiny("llama"), exits, replace(closed, thresholds=(0.0, 1.0, 1.0)))
    whole = Engine(tiny("llama"), exits, Policy((0.0, 1.0, 1.0)))
    assert opened.plan.head.flops == whole.plan.head.flops == whole.plan.exit_head.flops > opened.plan.exit_head.flops


@torch.inference_mode()
@pytest.mark.parametrize("index", [0, 1])
def test_harm_is_what_a_token_that_leaves_does_to_later_ones(family: str, index: int) -> None:
    backbone = tiny(family)
    exit = list(modest_exits(family, readout="ffn", tails=TAILS))[index]
    ids, counted, start = list(range(40, 60)), torch.arange(20) >= 8, exit.block
    at = hidden_at(family, ids)
    logits = backbone.logits(at[BLOCKS][0])
    top = logits.log_softmax(-1).topk(16)
    text = TeacherText(torch.tensor(ids), at[start][0, :, None], top.indices, top.values, counted)
    adapted, _ = exit.adapter(at[start].float())
    rows = top.indices[counted, :4].unique()
    for position, harm in zip([8, 13, 18], harms(backbone, exit, text, 0, adapted, [8, 13, 18]).tolist(), strict=True):
        state, later = backbone.state(), []
        for place in range(20):
            h = at[start][:, place : place + 1]
            step = backbone.step(h, place)
            if place == position:
                backbone.project(h, start, BLOCKS - exit.tail, state, step)
                backbone.run(adapted[:, place : place + 1], BLOCKS - exit.tail, BLOCKS, state, step)
            else:
                later.append(backbone.run(h, start, BLOCKS, state, step)[0])
        q = backbone.logits(torch.cat(later[position:]), rows).log_softmax(-1)
        p = logits[position + 1 :, rows].log_softmax(-1)
        roots = (p.exp() * (p - q)).sum(-1).clamp(min=0).sqrt()
        assert harm == pytest.approx(CHANGES * float(roots.sum()), rel=2e-2, abs=3e-4)
        assert harm > 1e-3


@pytest.mark.parametrize("variant", ["mamba2", *COMPILED_TWO[1:]])
def test_a_forked_talk_with_tokens_that_wait_goes_on_like_the_first(variant):
    """What waiting tokens left in the tails' blocks is made room for in both."""
    waiting = 0
    for seed in range(6):
        engine = Engine(
            tiny(variant), exits_for(variant, "ffn", "ffn", tails=TAILS, seed=seed), Policy((0.6, 0.8, 0.7)), "defer"
        )
        talk, prompt = Talk(), some_prompts(1, seed=seed)[0]
        answer = [token.id for token in engine.stream(prompt, talk, max_tokens=10, end_ids=frozenset())]
        waiting += talk.sequence.pending
        more, twin = [*prompt, *answer, 60, 61], talk.fork()
        first, second = ([token.id for token in engine.stream(more, each, max_tokens=20)] for each in (talk, twin))
        assert first == second
    assert waiting
