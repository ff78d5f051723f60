"""How far drafts run ahead of full depth."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import TAILS, exact, library_tokens, modest_exits, some_prompts
from models import BLOCKS, HIDDEN, tiny
from offramp import Engine, Exits, ExitsConfig, Policy
from offramp.decode import drafting
from offramp.decode.request import Talk
from offramp.decode.sampling import Sampling
from offramp.errors import CorruptFile
from offramp.exits.exits import Exit
from offramp.exits.ngrams import Ngrams, ngrams_of
from offramp.exits.parts import unit
from offramp.exits.readouts import DeepAdapter
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import MOST_DRAFTS, Part
from offramp.model.compiled.steps import Steps
from offramp.model.compiled.weights import FORMATS
from offramp.training.drafting import runs


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])  # random models whose early blocks are often right
def test_a_draft_is_only_worth_what_all_drafts_before_it_are_worth_together(family: str) -> None:
    """A draft is useless if a draft before it is wrong, so the product of their confidences must pass the threshold."""
    engine = Engine(tiny(family), modest_exits(family), Policy((0.3,) * 3), "verify", lookup=0)
    longest = 0
    for prompt in some_prompts(6, seed=1):
        tokens = engine.generate(prompt, max_tokens=24).tokens
        for early, drafts in groupby(tokens, lambda token: token.exit_block < BLOCKS):
            if early:
                sure = [token.confidence for token in drafts]
                longest = max(longest, len(sure))
                assert math.prod(sure) > 0.3
    assert longest > 1


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
    """An engine whose exit drafts in compiled code, from a list of every second token."""
    backbone, exits = tiny(family), drafting_exits(family, tails, middle, block)
    exits.shortlist = torch.arange(0, backbone.vocab_size, 2)
    return Engine(backbone, exits, Policy((threshold,), "max-prob"), "verify", **options)


def costing(engine: Engine, row: float, asking: float) -> Engine:
    """The engine, whose drafts cost so much: in steps of full depth, of a row of a chunk, and of asking the exit.

    By its record, half of its drafts are right.
    """
    assert engine.drafting
    rows = tuple(row * drafts for drafts in range(MOST_DRAFTS + 1))
    part = Part(
        "drafter", **(engine.drafting.part.fields | {"costs": torch.tensor(rows, dtype=torch.float32), "asking": asking})
    )
    engine.drafting = replace(engine.drafting, by_hand=asking, rows=rows, asking=asking, part=part)
    engine.drafting.exits.training["validation"] = [{"block": engine.drafting.block, "agreement": 0.5}]
    return engine


@pytest.mark.parametrize("lookup", [0, 3])
@pytest.mark.parametrize(("block", "middle"), [(0, 0), (1, 1), (0, 4), (2, 4)])
@pytest.mark.parametrize("tails", [(), TAILS, (3, 0, 0)], ids=str)
@pytest.mark.parametrize("family", ["llama/compiled", "qwen3/compiled", "mistral/compiled", "mamba2/compiled"])
def test_compiled_drafts_give_full_depths_tokens_and_states(
    family: str, tails: tuple[int, ...], block: int, middle: int, lookup: int
) -> None:
    if tails and family == "mamba2/compiled":
        assert drafting_engine(family, tails).ahead is None  # a Mamba tail is run by the other path
        return
    stood = rejected = 0
    for threshold in (0.0, 0.02):
        engine = costing(drafting_engine(family, tails, threshold, middle, block, lookup=lookup, max_pending=5), 0, 0)
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


def test_compiled_drafts_are_those_of_the_read_out() -> None:
    """What the compiled exit drafts first is what its module says for the same states."""
    family = "llama/compiled"
    for tails, middle, block in (((), 0, 1), (TAILS, 0, 0), ((), 3, 0), (TAILS, 5, 2)):
        engine = costing(drafting_engine(family, tails, middle=middle, block=block, lookup=0), 0, 0)
        exit, _ = engine.open_exits[0]
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
                    drafted_id(backbone, exit, middle, ids[: len(prompt) + place], engine.exit_head.shortlist)
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


@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled"])
def test_drafts_that_fail_cost_next_to_nothing(family: str) -> None:
    """Where the exit is never right, it is asked less and less often."""
    engine = costing(drafting_engine(family), 0.1, 0.1)
    exit, _ = engine.open_exits[0]
    exit.adapter.down.weight.zero_()
    cost = tokens = 0.0
    with pytest.MonkeyPatch.context() as patch:
        take_steps = type(engine.backbone.runtime).take_steps

        def counted(*args: Any) -> Steps:
            nonlocal cost
            steps: Steps = take_steps(*args)
            cost += sum(1 + 0.1 * made.drafts + 0.1 * made.asked for made in steps.rounds)
            return steps

        patch.setattr(type(engine.backbone.runtime), "take_steps", counted)
        for prompt in some_prompts(6):
            tokens += len(engine.generate(prompt, max_tokens=200).tokens)
    assert tokens > 600
    assert cost <= 1.03 * tokens


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


def test_a_table_of_ngrams_says_what_followed_most_often() -> None:
    ids = torch.tensor([1, 2, 3, 9, 2, 3, 9, 2, 3, 7, 2, 3, 9])
    counted = torch.ones(len(ids) - 1, dtype=torch.bool)
    table = ngrams_of([(ids[:-1], ids[1:], counted)])
    assert table.after([5, 2, 3]) == (9, pytest.approx(3 / 6, abs=0.01))
    assert table.after([3, 9]) == (2, pytest.approx(2 / 4, abs=0.01))
    assert table.after([3, 7]) is None  # seen once
    assert table.after([3]) is None
    later = torch.tensor([2, 3, 4, 2, 3, 4])
    more = ngrams_of([(later[:-1], later[1:], counted[:5])], before=table)
    assert more.after([2, 3]) == (4, pytest.approx(2 / 4, abs=0.01))
    assert more.after([3, 9]) == table.after([3, 9])
    most = ngrams_of([(ids[:-1], ids[1:], counted)], most=2)
    assert len(most.keys) == 2  # the most frequent one, and an empty slot
    assert most.after([2, 3]) == (9, pytest.approx(0.5, abs=0.01))


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


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("row", "asking", "drafts"), [(0.0, 0.0, True), (0.3, 0.0, False), (0.0, 0.6, False)])
def test_python_drafts_beside_other_answers_only_where_that_pays(row, asking, drafts, sampling) -> None:
    family = "llama/compiled"
    engine = costing(drafting_engine(family, sampling=sampling), row, asking)
    full, prompts = Engine(tiny(family), sampling=sampling), some_prompts(3)
    answers = engine.generate_batch(prompts, max_tokens=12)
    assert [answer.ids for answer in answers] == [full.generate(prompt, max_tokens=12).ids for prompt in prompts]
    assert any(answer.acceptance_rate is not None for answer in answers) == drafts


def test_drafts_beside_others_pay_less_the_more_they_are() -> None:
    made = costing(drafting_engine("llama/compiled"), 0.125, 0.1).drafting
    assert made
    # A row costs an eighth of a step: 1.5 (1 + (n - 1) / 8) is more than 1.1 + (2 n - 1) / 8 for n up to 5.
    assert [made.pays_beside(answers) for answers in (1, 2, 5, 6, 9, 40)] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("name", "instructions"),
    [("AMD EPYC", "AVX-512 BF16 and VNNI"), ("AMD EPYC", "AVX2"), ("Intel Xeon", "AVX-512 and VNNI")],
)
def test_the_table_of_machines_has_a_row_for_each_format(name: str, instructions: str, monkeypatch) -> None:
    monkeypatch.setattr(drafting, "processor", lambda: name)
    monkeypatch.setattr(drafting, "kernels", lambda: instructions)
    for weight_format in FORMATS:
        costs = drafting.row_costs(weight_format)
        assert costs is not drafting.ELSEWHERE
        assert costs[0] == 0
        assert len(costs) > MOST_DRAFTS
        assert list(costs) == sorted(costs)
    monkeypatch.setattr(drafting, "kernels", lambda: "NEON")
    assert drafting.row_costs("int4") is drafting.ELSEWHERE


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled"])
def test_the_repetition_penalty_of_compiled_code_is_the_librarys(family: str, penalty: float) -> None:
    sampling = Sampling(repetition_penalty=penalty)
    compiled, step_by_step = Engine(tiny(family), sampling=sampling), Engine(tiny(family), sampling=sampling)
    drafting = costing(drafting_engine(family, sampling=sampling), 0, 0)
    step_by_step.ahead = None
    for prompt in ("Some words", "abc abc", "Hello there!", "1 2 3 1 2 3"):
        expected = library_tokens(family, prompt, 40, repetition_penalty=penalty)
        for engine in (compiled, drafting, step_by_step):
            assert engine.generate(prompt, max_tokens=40).ids == expected


@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled"])
def test_compiled_drafts_stop_at_a_stop_string_and_a_talk_goes_on(family: str) -> None:
    full, engine = Engine(tiny(family)), costing(drafting_engine(family), 0, 0)
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
    full, engine = Engine(tiny(family)), costing(drafting_engine(family, middle=middle), 0, 0)
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
