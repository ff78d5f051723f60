"""What exits and drafts would save: bounds that can be worked out by hand."""

from __future__ import annotations

import pytest

from offramp.errors import BadInput
from offramp.evaluation.anatomy import Anatomy, anatomy
from offramp.evaluation.what_if import Scenario, what_if
from offramp.model.compiled.library import MOST_DRAFTS
from offramp.model.loading import outline

NAMES = ["mistralai/Mistral-7B-v0.3", "mistralai/Mamba-Codestral-7B-v0.1"]


@pytest.fixture(params=NAMES, scope="module")
def facts(request: pytest.FixtureRequest) -> Anatomy:
    return anatomy(outline(request.param, "bfloat16"), None)


def test_the_weights_that_a_token_reads_are_those_of_the_model(facts) -> None:
    embedding = facts.vocab_size * facts.hidden_size
    assert facts.full_bytes == pytest.approx(2 * (facts.parameters - embedding), rel=0.05)  # keys, states
    assert 0 < facts.draft_bytes < 0.1 * facts.full_bytes


def test_exits_that_never_agree_cost_their_gates_and_ones_that_always_do_save_the_rest(facts) -> None:
    full, never = what_if(facts, Scenario((0.0,), ()))
    assert (full.speed, full.bytes) == (1, facts.full_bytes)
    assert 0.99 < never.speed < 1
    always = what_if(facts, Scenario((1.0,), ()))[1]
    assert (always.bytes, always.flops) == (facts.leaving[0].bytes, facts.leaving[0].flops)
    assert always.how == f"100% leave after block {facts.leaving[0].after_block}"
    half = what_if(facts, Scenario((0.2, 0.5, 0.4), ()))[1]
    first, second, _, stays = facts.leaving
    assert half.flops == pytest.approx(0.2 * first.flops + 0.3 * second.flops + 0.5 * stays.flops)


def test_drafts_that_never_stand_are_not_made_and_right_ones_make_a_whole_chunk(facts) -> None:
    assert what_if(facts, Scenario((), (0.0,)))[1].how == "no drafts"
    free = what_if(facts, Scenario((), (1.0,), rows=0.0))[1]
    assert free.how == f"{MOST_DRAFTS} drafts, {MOST_DRAFTS + 1:.2f} tokens a pass"
    moved = (facts.full_bytes + MOST_DRAFTS * facts.draft_bytes) / (MOST_DRAFTS + 1)
    assert (free.bytes, free.speed) == (pytest.approx(moved), pytest.approx(facts.full_bytes / moved))
    # The second draft stands half as often: 1 + 0.8 + 0.8 · 0.4 tokens.
    two = what_if(facts, Scenario((), (0.8, 0.4, 0.0), rows=0.0))[1]
    assert two.how == "2 drafts, 2.12 tokens a pass"
    dear = what_if(facts, Scenario((), (0.8,), rows=2.0))[1]
    assert dear.how == "no drafts"


def test_a_bandwidth_gives_times(facts) -> None:
    full, exits = what_if(facts, Scenario.parse(["agreement=0.5", "bandwidth=100"]))
    assert full.ms == pytest.approx(facts.full_bytes / 100e6)
    assert exits.ms == pytest.approx(full.ms / exits.speed)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["agreement=often"], "no name with numbers"),
        (["agreement"], "no name with numbers"),
        (["bandwidth=30"], "needs one of the first two"),
        (["drafts=0.5", "luck=1"], "needs one of the first two"),
        (["drafts=1.5"], "from 0 to 1"),
        (["drafts=0.5", "bandwidth=0"], "above 0"),
        (["drafts=0.5", "bandwidth=nan"], "above 0"),
    ],
)
def test_a_scenario_that_says_nothing_is_refused(entries, said) -> None:
    with pytest.raises(BadInput, match=said) as error:
        Scenario.parse(entries)
    assert "--what-if" in error.value.hint


def test_each_exit_needs_a_share(facts) -> None:
    with pytest.raises(BadInput, match="names 2 shares"):
        what_if(facts, Scenario((0.5, 0.6), ()))
