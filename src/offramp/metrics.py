"""How alike two answers are, and how well a gate ranks: token F1, word F1, area under the ROC curve."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Hashable, Sequence

from torch import Tensor


def token_f1(answer: Sequence[int], reference: Sequence[int]) -> float:
    """Harmonic mean of precision and recall over the two bags of tokens, in [0, 1]: consistency with a reference."""
    return _f1(answer, reference)


def _f1(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    if not answer or not reference:
        return float(list(answer) == list(reference))
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def normalised(text: str) -> list[str]:
    """The words of an answer as SQuAD's official script compares them: lower case, no punctuation, no articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def answer_f1(answer: str, references: Sequence[str]) -> float:
    """Word F1 with the best of the references, in [0, 1] (SQuAD, arXiv 1606.05250, section 6.1)."""
    words = normalised(answer)
    return max((_f1(words, normalised(reference)) for reference in references), default=0.0)


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN if one kind is missing. Both (n,)."""
    n_positive = int(positive.sum())
    n_negative = positive.numel() - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    _, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks = (last - (counts - 1) / 2)[inverse]  # mean rank of each tied group, from 1
    return float((ranks[positive.bool()].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
