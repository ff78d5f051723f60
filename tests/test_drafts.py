"""Drafts: what they come from, when they are made, and that answers are full depth's all the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import TAILS, costing, exact, library_tokens, modest_exits, same_or_tied, some_prompts
from models import BLOCKS, HIDDEN, LLAMA, compiled_only, tiny
from offramp import Engine, Exits, ExitsConfig, Policy
from offramp.decode import row_costs
from offramp.decode.drafts import accepted_by
from offramp.decode.request import Talk
from offramp.decode.sampling import Sampling
from offramp.errors import CorruptFile
from offramp.evaluation.bench import measured_costs
from offramp.exits.exits import Exit
from offramp.exits.ngrams import Ngrams, ngrams_of
from offramp.exits.parts import unit
from offramp.exits.readouts import DeepAdapter
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import MOST_DRAFTS
from offramp.training.drafting import runs


def drafting_exits(family: str, tails: tuple[int, ...] = (), middle: int = 0, block: int = 1) -> Exits:
    """An exit after a block, which drafts, and reads a middle state if that is not 0."""
    exits = Exits.new(tiny(family), ExitsConfig((block,), "linear", "deep", 32, 32, tails=tails[:1], middle=middle))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in exits.modules.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    exits.modules.eval().requires_grad_(False)
    return exits


def drafting_engine(
    family: str, tails: tuple[int, ...] = (), threshold: float = 0.0, middle: int = 0, block: int = 1, **options: Any
) -> Engine:
    """An engine whose exit drafts, from a list of every second token."""
    backbone, exits = tiny(family), drafting_exits(family, tails, middle, block)
    exits.shortlist = torch.arange(0, backbone.vocab_size, 2)
    return Engine(backbone, exits, Policy((threshold,), "max-prob"), "verify", **options)


@pytest.mark.parametrize("lookup", [0, 3])
@pytest.mark.parametrize(("block", "middle"), [(0, 0), (1, 1), (0, 4), (2, 4)])
@pytest.mark.parametrize("tails", [(), TAILS, (3, 0, 0)], ids=str)
@pytest.mark.parametrize("family", ["llama/compiled", "qwen3/compiled", "mistral/compiled", "mamba2/compiled"])
def test_drafts_give_full_depths_tokens_and_states(
    family: str, tails: tuple[int, ...], block: int, middle: int, lookup: int
) -> None:
    stood = rejected = 0
    for threshold in (0.0, 0.02):
        engine = costing(drafting_engine(family, tails, threshold, middle, block, lookup=lookup, max_pending=5))
        for prompt in some_prompts(8, seed=int(100 * threshold)):
            batch, talk = engine.batch(), Talk()
            request = batch.add(prompt, talk, max_tokens=32)
            assert talk.sequence
            while not request.finish_reason:
                batch.step()
                exact(talk.sequence, family)
            ids = [token.id for token in request.tokens]
            assert ids == Engine(tiny(family)).generate(prompt, max_tokens=32).ids
            stood += sum(token.exit_block < BLOCKS for token in request.tokens)
            rejected += talk.sequence.rejected
    assert rejected
    assert stood or not block  # an untrained exit is hardly ever right about an embedding


def test_drafts_are_those_of_the_read_out() -> None:
    """What the exit drafts first is what its module says for the same states."""
    family = "llama/compiled"
    for tails, middle, block in (((), 0, 1), (TAILS, 0, 0), ((), 3, 0), (TAILS, 5, 2)):
        engine = costing(drafting_engine(family, tails, middle=middle, block=block, lookup=0))
        exit, _ = engine.plan.open_exits[0]
        for prompt in some_prompts(5):
            batch = engine.batch()
            request = batch.add(prompt, max_tokens=24)
            while not request.finish_reason:
                batch.step()
            backbone, ids = engine.backbone, request.sequence.ids
            drafted = [place for place, token in enumerate(request.tokens) if token.exit_block < BLOCKS]
            for place in drafted:
                if place and request.tokens[place - 1].exit_block < BLOCKS:
                    continue  # the second draft of a round reads what the exit made of the first
                assert (
                    drafted_id(backbone, exit, middle, ids[: len(prompt) + place], engine.plan.exit_head.shortlist)
                    == ids[len(prompt) + place]
                )


@torch.inference_mode()
def drafted_id(backbone: Backbone, exit: Exit, middle: int, ids: list[int], shortlist: Tensor | None) -> int:
    """The token that an exit drafts after these ids, whose deep states are full depth's."""
    assert shortlist is not None
    h, step = backbone.embed(torch.tensor([ids]))
    state = backbone.state()
    shallow = backbone.run(h, 0, exit.block, state, step)
    state = backbone.state()
    before = backbone.step(h[:, :-1], 0)
    states = [backbone.run(h[:, :-1], 0, middle, state, before)] if middle else []
    top = backbone.run(states[0] if middle else h[:, :-1], middle, BLOCKS, state, before)
    read = [shallow[:, -1:], *(deep[:, -1:] for deep in (top, *states))]
    adapted, _ = exit.adapter(torch.cat(read, dim=-1).float())
    if exit.tail:
        adapted = backbone.run(adapted, BLOCKS - exit.tail, BLOCKS, state, backbone.step(adapted, len(ids) - 1))
    return int(shortlist[backbone.head_of(shortlist)(adapted)[0, -1].argmax()])


def test_a_text_that_repeats_itself_is_looked_up() -> None:
    engine = costing(drafting_engine("llama/compiled", lookup=3), 0.1, 1.0)
    assert max(engine.generate(prompt, max_tokens=200).tokens_per_deep_pass for prompt in some_prompts(8)) > 2


@torch.inference_mode()
@pytest.mark.parametrize(("block", "middle"), [(1, 0), (0, 4)])
@pytest.mark.parametrize("tail", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "llama/compiled", "mistral", "qwen3"])
def test_drafts_are_trained_on_the_states_that_decoding_makes(family: str, tail: int, block: int, middle: int) -> None:
    """What training makes of all tokens at once is what decoding makes of them one by one, as any draft of a run."""
    backbone = tiny(family)
    exit = next(iter(drafting_exits(family, (tail,), middle, block)))
    ids = torch.tensor([some_prompts(1, seed=3)[0] * 4])[:, :24]
    hidden, depth = {}, backbone.n_blocks
    h, step = backbone.embed(ids)
    for done in range(depth + 1):
        hidden[done] = h.float()
        h = backbone.run(h, done, done + 1, backbone.state(), step) if done < depth else h
    trained = runs(backbone, backbone.trainable_from(depth - tail), exit, middle, hidden)
    for first in range(1, ids.shape[1] - 3):
        state = backbone.state()
        if tail:
            before = hidden[depth - tail][:, :first].to(backbone.dtype)
            backbone.run(before, depth - tail, depth, state, backbone.step(before, 0))
        top = hidden[depth][:, first - 1 : first]
        for number in range(3):
            place = first + number
            read = [hidden[exit.block][:, place : place + 1], top]
            read += [hidden[middle][:, first - 1 : first]] if middle else []
            adapted, _ = exit.adapter(torch.cat(read, dim=-1))
            if tail:
                h = adapted.to(backbone.dtype)
                adapted = backbone.run(h, depth - tail, depth, state, backbone.step(h, place)).float()
            top = adapted
            torch.testing.assert_close(trained[number][:, place : place + 1], top, atol=2e-4, rtol=1e-3)


def own_text(engine: Engine, count: int = 12) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Answers at full depth: the ids, the token that follows each, and which of these count."""
    texts = []
    for prompt in some_prompts(count):
        ids = prompt + engine.generate(prompt, max_tokens=60).ids
        places = torch.arange(len(ids) - 1)
        texts.append((torch.tensor(ids[:-1]), torch.tensor(ids[1:]), places >= len(prompt) - 1))
    return texts


def answered(ids: list[int], asked: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A text for `ngrams_of`, whose first tokens are a prompt."""
    return torch.tensor(ids[:-1]), torch.tensor(ids[1:]), torch.arange(len(ids) - 1) >= asked - 1


def test_a_table_of_ngrams_says_what_followed_most_often() -> None:
    table = ngrams_of([answered(ids) for ids in ([1, 2, 3, 9], [9, 2, 3, 9, 2], [4, 2, 3, 9, 2], [5, 2, 3, 7])])
    assert table.after([5, 2, 3]) == (9, pytest.approx(3 / 6, abs=0.01))
    assert table.after([3, 9]) == (2, pytest.approx(2 / 4, abs=0.01))
    assert table.after([3, 7]) is None  # seen once
    assert table.after([3]) is None
    more = ngrams_of([answered([2, 3, 4]), answered([7, 2, 3, 4])], before=table)
    assert more.after([2, 3]) == (4, pytest.approx(2 / 4, abs=0.01))
    assert more.after([3, 9]) == table.after([3, 9])
    most = ngrams_of([answered(ids) for ids in ([1, 2, 3, 9], [5, 2, 3, 9], [6, 2, 3, 9, 4], [7, 8, 9, 4])], most=2)
    assert len(most.keys) == 2  # the most frequent one, and an empty slot
    assert most.after([2, 3]) == (9, pytest.approx(3 / 5, abs=0.01))


def test_a_table_of_ngrams_learns_once_from_all_answers_to_a_prompt() -> None:
    one, other = [5, 6, 7, 2, 3, 9, 2, 3, 9, 4], [5, 6, 8, 2, 3, 9, 4]
    assert ngrams_of([answered(one, 3)] * 5).after([2, 3]) is None
    assert ngrams_of([answered(one, 3)] * 5 + [answered(other, 3)]).after([2, 3]) == (9, pytest.approx(2 / 4, abs=0.01))


@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled"])
def test_a_table_of_ngrams_drafts_for_nothing(family: str, tmp_path: Path) -> None:
    full = Engine(tiny(family))
    exits = drafting_exits(family)
    exits.ngrams = ngrams_of(own_text(full))
    exits.config = replace(exits.config, ngrams=len(exits.ngrams.keys))
    exits.save(tmp_path)
    loaded = Exits.load(tmp_path, tiny(family))
    assert loaded.ngrams is not None
    assert torch.equal(loaded.ngrams.values, exits.ngrams.values)
    engine = costing(Engine(tiny(family), loaded, Policy((0.0,), "max-prob"), "verify", lookup=0), 0.1, 9.0)
    stood = 0
    for prompt in some_prompts(12):
        answer = engine.generate(prompt, max_tokens=60)
        assert answer.ids == full.generate(prompt, max_tokens=60).ids
        for place, token in enumerate(answer.tokens):
            if token.exit_block == 0:
                expected = exits.ngrams.after(prompt + answer.ids[:place])
                assert expected is not None
                assert expected[0] == token.id
                stood += 1
    assert stood > 0


@pytest.mark.parametrize("damage", ["full", "beyond", "odd"])
def test_a_damaged_table_of_ngrams_is_refused(damage: str, tmp_path: Path) -> None:
    exits = drafting_exits("llama")
    size = 12 if damage == "odd" else 16
    keys, values = torch.zeros(size, dtype=torch.int32), torch.full((size,), 5 << 8, dtype=torch.int32)
    if damage == "full":
        keys += 1
    if damage == "beyond":
        values += 1 << 24
    exits.ngrams, exits.config = Ngrams(keys, values), replace(exits.config, ngrams=size)
    exits.save(tmp_path)
    with pytest.raises(CorruptFile, match="n-grams"):
        Exits.load(tmp_path, tiny("llama"))


@pytest.mark.parametrize("tails", [(), (2, 0, 0)], ids=str)
def test_a_draft_starts_from_the_linear_map_that_fits_best(tails: tuple[int, ...]) -> None:
    exit = next(iter(drafting_exits("llama", tails)))
    adapter = exit.adapter
    assert isinstance(adapter, DeepAdapter)
    adapter.down.weight.zero_()
    torch.manual_seed(0)
    h, top, forward, back = (torch.randn(4000, HIDDEN) for _ in range(4))
    forward, back = forward[:HIDDEN] / 8, back[:HIDDEN] / 8
    target = h + unit(h) @ forward + unit(top) @ back + 0.5
    adapter.norm.fit(h)
    adapter.fit(h, top, target)
    found, wanted = adapter(torch.cat([h, top], dim=1)[None])[0][0], target if tails else unit(target)
    assert float((found - wanted).std() / wanted.std()) < (0.2 if tails else 0.35)


@pytest.mark.parametrize(
    ("name", "instructions"),
    [("AMD EPYC", "AVX-512 BF16 and VNNI"), ("AMD EPYC", "AVX2"), ("Intel Xeon", "AVX-512 and VNNI")],
)
def test_the_table_of_machines_has_a_row_for_each_format(name: str, instructions: str, monkeypatch) -> None:
    monkeypatch.setattr(row_costs, "processor", lambda: name)
    monkeypatch.setattr(row_costs, "kernels", lambda: instructions)
    for precision in ("float32", "bfloat16", "int8", "int4"):
        of_large, of_small = (row_costs.costs_in_table(precision, size) for size in (1 << 30, 1 << 20))
        assert of_large[:8] != row_costs.ELSEWHERE
        for costs in (of_large, of_small):
            assert costs[0] == 0
            assert len(costs) == MOST_DRAFTS + 1
            assert list(costs) == sorted(costs)
    monkeypatch.setattr(row_costs, "kernels", lambda: "NEON")
    assert row_costs.costs_in_table("int4", 1 << 30) == pytest.approx([0.15 * row for row in range(MOST_DRAFTS + 1)])
    assert row_costs.costs_in_table("int4", 1 << 20)[:8] == row_costs.CACHED_ELSEWHERE


def test_costs_that_were_measured_here_replace_the_tables(own_cache: Path) -> None:
    backbone = tiny("llama/compiled")
    table = row_costs.costs_in_table(backbone.precision, 1 << 20)
    assert row_costs.row_costs(backbone) == table
    found = measured_costs(backbone, rounds=2)
    assert found[0] == 0
    assert list(found) == sorted(found)
    row_costs.keep(backbone, [0.1 * (width - 1) for width in row_costs.WIDTHS])
    assert row_costs.row_costs(backbone) == pytest.approx([0.1 * rows for rows in range(32)])
    assert Engine(backbone, fill="verify").plan.drafts.rows == row_costs.row_costs(backbone)
    assert row_costs.row_costs(tiny("mamba2/compiled")) == table
    for damaged in ("not JSON", '{"a": 1}', *(json.dumps({row_costs._key(backbone): each}) for each in DAMAGED)):
        (own_cache / "costs.json").write_text(damaged)
        assert row_costs.row_costs(backbone) == table
    row_costs.keep(backbone, found)  # in a file that was damaged


LAST = len(row_costs.WIDTHS) - 1
DAMAGED = (
    7,
    [0.0] * LAST,
    [0.1] * (LAST + 1),
    [0.0] * LAST + ["x"],
    [0.0, 0.3, 0.2, *[1.0] * (LAST - 2)],
    [0.0] * LAST + [1e99],
    [0.0, math.nan, *[1.0] * (LAST - 1)],
)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled"])
def test_the_repetition_penalty_is_the_librarys(family: str, penalty: float) -> None:
    sampling = Sampling(repetition_penalty=penalty)
    for prompt in ("Some words", "abc abc", "1 2 3 1 2 3"):
        expected = library_tokens(family, prompt, 40, repetition_penalty=penalty)
        for engine in (Engine(tiny(family), sampling=sampling), costing(drafting_engine(family, sampling=sampling))):
            assert engine.generate(prompt, max_tokens=40).ids == expected


@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled"])
def test_drafts_stop_at_a_stop_string_and_a_talk_goes_on(family: str) -> None:
    full, engine = Engine(tiny(family)), costing(drafting_engine(family))
    for prompt in ("Some words", "abc abc", "Hello there!"):
        whole = full.generate(prompt, max_tokens=40)
        stop = whole.text[5:7]
        expected = full.generate(prompt, max_tokens=40, stop=(stop,))
        talk = Talk()
        tokens = list(engine.stream(prompt, talk, max_tokens=40, stop=(stop,)))
        assert [token.id for token in tokens] == expected.ids
        assert "".join(token.text for token in tokens) == expected.text
        longer = engine.backbone.prompts.encode(prompt) + expected.ids + [65, 66]
        more = [token.id for token in engine.stream(longer, talk, max_tokens=12)]
        assert more == full.generate(longer, max_tokens=12).ids


@pytest.mark.parametrize("middle", [0, 4])
@pytest.mark.parametrize("family", ["llama/compiled", "qwen3/compiled", "mamba2/compiled"])
def test_a_request_goes_on_in_company_and_alone_again(family: str, middle: int) -> None:
    full, engine = Engine(tiny(family)), costing(drafting_engine(family, middle=middle))
    rejected = 0
    for first, second in (some_prompts(2, seed=seed) for seed in range(4)):
        batch, talk = engine.batch(), Talk()
        alone = batch.add(first, talk, max_tokens=60)
        for _ in range(4):
            batch.step()
        joined = batch.add(second, max_tokens=10)
        for _ in batch.run():
            pass
        assert talk.sequence
        exact(talk.sequence, family)
        for request, prompt in ((alone, first), (joined, second)):
            wanted = full.generate(prompt, max_tokens=len(request.tokens)).ids
            assert [token.id for token in request.tokens] == wanted
        rejected += alone.sequence.rejected
    assert rejected


def test_a_record_says_how_often_drafts_were_right() -> None:
    exits = modest_exits("llama")
    exit = next(iter(exits))
    for row, shares in (({"acceptance": [0.6, 0.5]}, (0.6, 0.5, 0.5)), ({"agreement": 0.4}, (0.4,) * 3), (None, (0,) * 3)):
        exits.training = {"validation": [{"block": exit.block, **row}] if row else []}
        assert accepted_by(exits, exit) == accepted_by(exits, exit, with_table=True) == shares
    exits.training = {"validation": [{"block": exit.block, "acceptance": [0.5, 0.4, 0.3], "with_table": [0.6] * 3}]}
    assert (accepted_by(exits, exit), accepted_by(exits, exit, with_table=True)) == ((0.5, 0.4, 0.3), (0.6,) * 3)
    for nonsense in (["often"], [1.5], [math.nan], 7, [10**400]):
        exits.training = {"validation": [{"block": exit.block, "acceptance": nonsense}]}
        with pytest.raises(CorruptFile, match="record of their training is damaged"):
            accepted_by(exits, exit)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=30, seed=3)], ids=["greedy", "sampled"])
def test_several_requests_get_full_depths_answers_whatever_drafts_cost(family: str, sampling: Sampling) -> None:
    exits, prompts, drafted = modest_exits(family, gate="linear"), some_prompts(3, seed=4), 0
    full = [Engine(tiny(family), sampling=sampling).generate(prompt, max_tokens=10).ids for prompt in prompts]
    for row in (0.0, 0.1):
        engine = costing(Engine(tiny(family), exits, Policy((0.0, 1.0, 0.1)), "verify", sampling, lookup=1), row)
        for prompt, whole, answer in zip(prompts, full, engine.generate_batch(prompts, max_tokens=10), strict=True):
            assert same_or_tied(family, prompt, answer.ids, whole)
            drafted += answer.acceptance_rate is not None
    assert drafted or not engine.steppers.compiled


def test_exact_runs_full_depth_and_says_so_where_no_compiled_code_runs() -> None:
    prompt, exits = some_prompts(1)[0] * 4, modest_exits("llama")
    with pytest.warns(UserWarning, match="'exact' runs full depth here"):
        engine = Engine(tiny("llama"), exits, Policy((0.0,) * 3), "verify")
    answer = engine.generate(prompt, max_tokens=24)
    assert answer.ids == Engine(tiny("llama")).generate(prompt, max_tokens=24).ids
    assert (answer.mode, answer.acceptance_rate, {token.exit_block for token in answer.tokens}) == ("exact", None, {BLOCKS})


@compiled_only
def test_a_choice_that_c_cannot_make_gets_full_depths_tokens() -> None:
    def last_but_one(logits: Tensor, ids: list[int]) -> int:
        return int(logits.argsort()[-2])

    engines = Engine(tiny(LLAMA), sampling=last_but_one), drafting_engine(LLAMA, sampling=last_but_one)
    for prompt in some_prompts(3):
        full, exact_ = (engine.generate(prompt, max_tokens=12) for engine in engines)
        assert exact_.ids == full.ids
