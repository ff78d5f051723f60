"""Confidences lie in [0, 1] and are higher for surer distributions. A policy refuses what it cannot use."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import BadInput
from offramp.exits.policy import CONFIDENCES, TRAINING_FREE, Policy

SMALL = 1e-5
each_confidence = pytest.mark.parametrize("confidence", TRAINING_FREE.values(), ids=TRAINING_FREE)


@st.composite
def logits(draw):
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 50))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return draw(st.floats(0, 100)) * torch.randn(rows, 2, vocabulary, generator=g)


@each_confidence
@settings(max_examples=40, deadline=None)
@given(logits())
def test_a_confidence_lies_between_0_and_1(confidence, logits):
    sure = confidence(logits)
    assert sure.shape == logits.shape[:-1]
    assert (sure >= -SMALL).all()
    assert (sure <= 1).all()  # exactly: a threshold of 1 must close the exit


@each_confidence
@pytest.mark.parametrize("vocabulary", [2, 97])
def test_a_near_one_hot_distribution_is_certain(confidence, vocabulary):
    logits = torch.zeros(vocabulary)
    logits[1] = 200
    assert float(confidence(logits)) == pytest.approx(1, abs=SMALL)


@each_confidence
@settings(max_examples=40, deadline=None)
@given(logits())
def test_nothing_is_less_sure_than_a_uniform_distribution(confidence, logits):
    assert (confidence(logits) >= confidence(torch.zeros_like(logits)) - SMALL).all()


@pytest.mark.parametrize(("name", "lowest"), [("max-prob", 1 / 97), ("margin", 0), ("entropy", 0)])
def test_a_uniform_distribution_has_the_lowest_confidence_there_is(name, lowest):
    assert float(TRAINING_FREE[name](torch.zeros(97))) == pytest.approx(lowest, abs=SMALL)


@each_confidence
@settings(max_examples=40, deadline=None)
@given(logits(), st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_no_confidence(confidence, logits, shift):
    torch.testing.assert_close(confidence(logits.double() + shift), confidence(logits.double()), rtol=0, atol=1e-9)


def test_max_prob_margin_and_entropy_of_a_known_distribution():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert float(TRAINING_FREE["max-prob"](logits)) == pytest.approx(0.5)
    assert float(TRAINING_FREE["margin"](logits)) == pytest.approx(0.25)
    assert float(TRAINING_FREE["entropy"](logits)) == pytest.approx(1 - 1.75 / 2)


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan"), float("inf"), float("-inf")])
def test_a_threshold_outside_0_to_1_is_refused_with_a_hint(threshold):
    with pytest.raises(BadInput, match="threshold") as caught:
        Policy((0.5, threshold))
    assert caught.value.hint


def test_an_unknown_confidence_is_refused_with_the_known_ones_as_a_hint():
    with pytest.raises(BadInput, match="vibes") as caught:
        Policy((0.5,), confidence="vibes")
    assert all(name in caught.value.hint for name in CONFIDENCES)


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_thresholds_from_0_to_1_and_every_known_confidence_are_accepted(confidence):
    assert Policy((0, 0.5, 1), confidence).confidence == confidence


def test_a_policy_asks_the_gate_unless_told_otherwise():
    assert Policy(()).confidence == "gate"


def test_a_decaying_threshold_is_calms():
    policy = Policy((0.5, 1.0, 0.0), decay=10)
    assert policy.threshold(0, 0) == pytest.approx(0.9 * 0.5 + 0.1)
    assert policy.threshold(0, 10) == pytest.approx(0.9 * 0.5 + 0.1 * math.exp(-1))
    assert policy.threshold(1, 3) == 1  # a closed exit stays closed
    assert policy.threshold(2, 1000) == pytest.approx(0)
    assert Policy((0.5,)).threshold(0, 7) == 0.5
    with pytest.raises(BadInput, match="decay"):
        Policy((0.5,), decay=-1)


def test_a_policy_describes_itself():
    assert Policy((1.0, 0.5)).describe() == "gate, closed 0.5"
    assert Policy((1.0, 0.5)).describe("mamba") == "mamba, closed 0.5"
    policy = Policy((0.25,), "margin", decay=16, candidates=2048)
    assert policy.describe("mamba") == "margin, 0.25, decay 16, 2,048 candidates"


def test_a_closed_policy_closes_every_exit():
    assert Policy.closed(3) == Policy((1.0, 1.0, 1.0))
