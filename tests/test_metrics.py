"""Token F1 and the area under the ROC curve equal their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.metrics import auroc, token_f1

ANSWERS = st.lists(st.integers(0, 6), max_size=12)
SCORED = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=40)  # few values, so many ties


def area(pairs):
    scores, positive = zip(*pairs, strict=True)
    return auroc(torch.tensor(scores, dtype=torch.float32), torch.tensor(positive))


def area_by_pairs(pairs):
    above = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high, positive in pairs
        if positive
        for low, also_positive in pairs
        if not also_positive
    ]
    return sum(above) / len(above) if above else math.nan


@given(ANSWERS)
def test_an_answer_agrees_fully_with_itself_in_any_order(answer):
    assert token_f1(answer, answer) == 1
    assert token_f1(answer, sorted(answer)) == 1


@given(ANSWERS.filter(bool), ANSWERS.filter(bool))
def test_answers_without_a_shared_token_score_nothing(answer, reference):
    assert token_f1(answer, [token + 100 for token in reference]) == 0


@given(ANSWERS, ANSWERS)
def test_f1_is_symmetric_and_lies_between_0_and_1(answer, reference):
    assert token_f1(answer, reference) == token_f1(reference, answer)
    assert 0 <= token_f1(answer, reference) <= 1


@given(ANSWERS.filter(bool), ANSWERS.filter(bool))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(answer, reference):
    shared = sum(min(answer.count(token), reference.count(token)) for token in set(answer))
    precision, recall = shared / len(answer), shared / len(reference)
    want = 2 * precision * recall / (precision + recall) if shared else 0
    assert token_f1(answer, reference) == pytest.approx(want)


def test_a_token_counts_as_often_as_it_occurs_in_both():
    assert token_f1([1, 1, 1, 1], [1]) == pytest.approx(2 * 1 / 5)
    assert token_f1([1, 1, 2], [1, 1, 3]) == pytest.approx(2 * 2 / 6)


def test_an_empty_answer_agrees_with_an_empty_one_only():
    assert token_f1([], []) == 1
    assert token_f1([], [1]) == 0
    assert token_f1([1], []) == 0
    assert token_f1((), []) == 1


def test_a_perfect_ranking_has_an_area_of_1_and_a_reversed_one_of_0():
    scores, positive = torch.arange(6.0), torch.tensor([0, 0, 0, 1, 1, 1])
    assert auroc(scores, positive) == 1
    assert auroc(-scores, positive) == 0


def test_equal_scores_have_an_area_of_one_half():
    assert auroc(torch.zeros(7), torch.tensor([1, 0, 1, 1, 0, 0, 1])) == 0.5


@settings(max_examples=40, deadline=None)
@given(SCORED)
def test_the_area_is_the_share_of_pairs_ranked_right(pairs):
    assert area(pairs) == pytest.approx(area_by_pairs(pairs), nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(SCORED)
def test_only_the_order_of_the_scores_matters(pairs):
    stretched = [(math.exp(score), positive) for score, positive in pairs]
    assert area(stretched) == pytest.approx(area(pairs), nan_ok=True)


@pytest.mark.parametrize("positive", [True, False])
def test_one_kind_alone_has_no_area(positive):
    assert math.isnan(auroc(torch.arange(4.0), torch.full((4,), positive)))
    assert math.isnan(auroc(torch.empty(0), torch.empty(0, dtype=torch.bool)))
