"""How alike two answers are, and how well a gate ranks: token F1, word F1, area under the ROC curve."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor


def token_f1(answer: Sequence[int], reference: Sequence[int]) -> float:
    """Harmonic mean of precision and recall over the two bags of tokens, in [0, 1]: consistency with a reference."""
    return _f1(answer, reference)


def _f1(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    if not answer or not reference:
        return float(list(answer) == list(reference))
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def squad_words(text: str) -> list[str]:
    """The words of an answer as SQuAD's and CoQA's official scripts have them: lower case, no punctuation, no articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def trivia_words(text: str) -> list[str]:
    """The words of an answer as TriviaQA's official script has them: punctuation and curly quotes separate words there."""
    parted = "".join(" " if character in _TRIVIA_PUNCTUATION else character for character in text.lower())
    return _ARTICLES.sub(" ", parted).split()


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_TRIVIA_PUNCTUATION = frozenset(string.punctuation + "‘’´`")
Words = Callable[[str], list[str]]


def best_f1(answer: str, references: Sequence[str], words: Words = squad_words) -> float:
    """Word F1 with the best of the references, in [0, 1] (SQuAD, arXiv 1606.05250, section 6.1); 0 without any."""
    answer_words = words(answer)
    return max((_f1(answer_words, words(reference)) for reference in references), default=0.0)


def best_recall(answer: str, references: Sequence[str], words: Words = squad_words) -> float:
    """The share of a reference's words that the answer has, for the best of the references, in [0, 1]; 0 without any."""
    given = Counter(words(answer))
    shares = ((wanted, sum((given & Counter(wanted)).values())) for wanted in map(words, references) if wanted)
    return max((found / len(wanted) for wanted, found in shares), default=0.0)


def best_match(answer: str, references: Sequence[str], words: Words = squad_words) -> float:
    """1 if the answer's words are one of the references', else 0."""
    answer_words = words(answer)
    return float(any(answer_words == words(reference) for reference in references))


def left_one_out(score: Callable[[str, Sequence[str]], float], answer: str, references: Sequence[str]) -> float:
    """The score by CoQA's rule: leave each reference out once, and average the scores (arXiv 1808.07042, section 5.1).

    So models compare with people: a person who gave one of the references is scored against the others only.
    """
    if len(references) < 2:
        return score(answer, references)
    subsets = [[*references[:index], *references[index + 1 :]] for index in range(len(references))]
    return sum(score(answer, subset) for subset in subsets) / len(subsets)


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
