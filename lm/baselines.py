"""How well do simpler models predict the same text? A 5-gram model over the same tokens, and xz.

    python -m lm.baselines CORPUS

Both learn from the training split and are measured on the test split, in bits per byte of its UTF-8 text. A language model
of a corpus must predict the end of every document too. The bits of these ends count, although they stand for no byte.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from lm.corpus import END, Tokens, load_tokens, piece_bytes, report
from offramp.errors import BadInput, OfframpError

Floats = npt.NDArray[np.float64]
Grams = npt.NDArray[np.uint64]


class KneserNey:
    """Interpolated modified Kneser-Ney (Chen and Goodman, "An empirical study of smoothing techniques", 1998, section 3).

    The highest order counts n-grams. A lower order counts the different tokens seen before an n-gram. Each order takes a
    discount from its counts (one for counts of 1, one for 2, one for 3 and more) and gives that mass to the order below;
    the lowest order gives it to all tokens equally. The text is one row of tokens; `end` stands before its first token, as
    it does between its documents.

    An n-gram is packed into 64 bits, its last token lowest, and looked up in sorted rows.
    """

    def __init__(self, tokens: Tokens, vocabulary: int, end: int, order: int = 5) -> None:
        self.vocabulary, self.end, self.order = vocabulary, end, order
        self._bits = max(1, (vocabulary - 1).bit_length())
        if order * self._bits > 64:
            raise BadInput(f"{order}-grams of {vocabulary} pieces do not fit 64 bits.", "Take a smaller vocabulary.")
        self.levels: list[_Level] = []  # from the lowest order to the highest
        grams, counts = np.unique(self._pack(self._windows(tokens, order)), return_counts=True)
        for length in range(order, 0, -1):
            self.levels.insert(0, _Level(grams, counts, self._bits))
            suffixes = grams & np.uint64((1 << (length - 1) * self._bits) - 1)
            grams, counts = np.unique(suffixes, return_counts=True)

    def probabilities(self, windows: Tokens) -> Floats:
        """P(last token | the others) for each row of windows (n, order): (n,)."""
        p = np.full(len(windows), 1 / self.vocabulary)
        for length, level in enumerate(self.levels, start=1):
            p = level.interpolate(self._pack(windows[:, self.order - length :]), p)
        return p

    def bits(self, tokens: Tokens) -> float:
        """−log2 of the probability of all tokens together; the first one follows `end`."""
        return float(-np.log2(self.probabilities(self._windows(tokens, self.order))).sum())

    def _windows(self, tokens: Tokens, order: int) -> Tokens:
        padded = np.concatenate([np.full(order - 1, self.end, dtype=tokens.dtype), tokens])
        return np.lib.stride_tricks.sliding_window_view(padded, order)

    def _pack(self, windows: Tokens) -> Grams:
        packed = np.zeros(len(windows), dtype=np.uint64)
        for column in windows.T:
            packed <<= np.uint64(self._bits)
            packed |= column.astype(np.uint64)
        return packed


class _Level:
    """One order: sorted n-grams with their discounted shares, and sorted contexts with the mass for the order below."""

    def __init__(self, grams: Grams, counts: npt.NDArray[np.int64], bits: int) -> None:
        self._bits = np.uint64(bits)
        discounts = modified_discounts(counts)[np.minimum(counts, 3)]
        contexts = grams >> self._bits
        starts = np.flatnonzero(np.r_[True, contexts[1:] != contexts[:-1]])
        totals = np.add.reduceat(counts, starts)
        self._grams = grams
        self._left = (counts - discounts) / np.repeat(totals, np.diff(np.r_[starts, len(grams)]))
        self._contexts = contexts[starts]
        self._passed_on = np.add.reduceat(discounts, starts) / totals

    def interpolate(self, grams: Grams, below: Floats) -> Floats:
        """The probabilities (n,) of this order, from those of the order below, which a new context keeps."""
        share = _look_up(self._contexts, self._passed_on, grams >> self._bits, 1.0)
        return _look_up(self._grams, self._left, grams, 0.0) + share * below


def modified_discounts(counts: npt.NDArray[np.int64]) -> Floats:
    """The discounts (4,) of a count of 0, 1, 2, and 3 or more. They depend on how many n-grams have the counts 1 to 4."""
    n = [int((counts == count).sum()) for count in range(1, 5)]
    fallback = np.array([0.0, 0.5, 1.0, 1.5])  # for a small text or a full level, in which one of the counts does not occur
    if not all(n):
        return fallback
    y = n[0] / (n[0] + 2 * n[1])
    discounts = np.array([0.0, *(k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3))])
    return discounts if (discounts[1:] > 0).all() else fallback


def _look_up(keys: Grams, values: Floats, wanted: Grams, otherwise: float) -> Floats:
    """The values of the wanted keys; `otherwise` for a key that is missing. The keys are sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    looked_up: Floats = np.where(keys[at] == wanted, values[at], otherwise)
    return looked_up


def xz_bits(train: bytes, test: bytes) -> int:
    """How many bits `xz -9e` needs for the test text after the training text.

    The preset's dictionary of 64 MiB reaches back over all of a training text that is shorter than that.
    """
    preset = 9 | lzma.PRESET_EXTREME
    return 8 * (len(lzma.compress(train + test, preset=preset)) - len(lzma.compress(train, preset=preset)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="a folder made by python -m lm.corpus")
    args = parser.parse_args()
    try:
        train, test = load_tokens(args.corpus, "train"), load_tokens(args.corpus, "test")
        tokenizer = AutoTokenizer.from_pretrained(args.corpus, trust_remote_code=False)
        size = int(piece_bytes(tokenizer)[test].sum())
        model = KneserNey(train, len(tokenizer), tokenizer.convert_tokens_to_ids(END))
    except OfframpError as error:
        report(parser, error)
    bits = model.bits(test)
    del model
    texts = [(args.corpus / f"{name}.txt").read_bytes() for name in ("train", "test")]
    result = {
        "test_bytes": size,
        "test_tokens": len(test),
        "kneser_ney_5": round(bits / size, 4),
        "kneser_ney_5_perplexity": round(math.exp(bits * math.log(2) / len(test)), 2),
        "xz_9e": round(xz_bits(*texts) / size, 4),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
